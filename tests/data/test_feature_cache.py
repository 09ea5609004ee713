"""Files of features: exact, never trusted blindly, bounded; and what a dataset makes of them."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from samtune.config import PromptOptions, ReadOptions
from samtune.data.datasets import SampleKey, SegmentationDataset, collate
from samtune.data.feature_cache import FeatureFiles, Form, KeptViews, digest, make_room
from samtune.data.files import Pair
from samtune.data.loading import make_loader
from samtune.errors import UserError
from samtune.structures import Batch

FORM = Form((4, 3, 5), torch.float32, torch.float32)


@pytest.fixture
def files(tmp_path):
    return FeatureFiles(tmp_path / "cache", "key", FORM)


def features(seed=0, shape=FORM.shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_what_is_read_is_what_was_written_in_the_same_layout(files):
    given = features().permute(1, 2, 0).contiguous().permute(2, 0, 1)  # channels last in memory
    files.write("a" * 64, given, (30, 41))
    found, size = files.read("a" * 64)
    assert torch.equal(found, given) and found.stride() == given.stride() and size == (30, 41)
    assert files.holds("a" * 64) and not files.holds("b" * 64)
    assert os.path.getsize(files.path("a" * 64)) <= FORM.file_bytes
    assert [path.suffix for path in files.folder.rglob("*") if path.is_file()] == [".safetensors"]


def test_bf16_halves_the_file_and_comes_back_in_the_models_format(tmp_path):
    files = FeatureFiles(tmp_path, "key", Form((64, 8, 8), torch.bfloat16, torch.float32))
    given = features(shape=(64, 8, 8))
    files.write("a" * 64, given, (8, 8))
    found, _ = files.read("a" * 64)
    assert found.dtype == torch.float32
    assert torch.equal(found, given.bfloat16().float())
    assert os.path.getsize(files.path("a" * 64)) < 1.2 * 2 * given.numel()


@pytest.mark.parametrize(
    "damage", ["short", "empty", "noise", "foreign", "shape", "format", "gone"]
)
def test_a_file_that_is_not_what_its_name_says_is_missing(files, damage):
    name, path = "a" * 64, files.path("a" * 64)
    files.write(name, features(), (8, 8))
    whole = path.read_bytes()
    if damage == "short":
        path.write_bytes(whole[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(len(whole)))
    elif damage == "foreign":
        files.write("b" * 64, features(1), (8, 8))
        path.write_bytes(files.path("b" * 64).read_bytes())
    elif damage in ("shape", "format"):
        form = Form((4, 3, 6), *FORM[1:]) if damage == "shape" else FORM._replace(stored=torch.half)
        other = FeatureFiles(files.folder, "key", form)
        other.write(name, features(shape=form.shape), (8, 8))
    else:
        path.unlink()
    assert not files.holds(name) and files.read(name) is None
    files.write(name, features(), (8, 8))
    assert files.holds(name)


def test_a_writer_that_dies_leaves_nothing_that_looks_whole(files, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"--cache_dir .*No space left"):
        files.write("a" * 64, features(), (8, 8))
    assert not [path for path in files.folder.rglob("*") if path.is_file()]


def test_room_is_made_by_what_others_used_longest_ago(files):
    names = [letter * 64 for letter in "abcd"]
    for age, name in enumerate(names):
        files.write(name, features(), (8, 8))
        os.utime(files.path(name), (1e9 - age, 1e9 - age))
    size = files.path(names[0]).stat().st_size
    mine = [files.path(names[3]), files.path("e" * 64)]  # the oldest, and one to come
    assert make_room(files.folder, mine, size, 3 * size, "") == 2
    assert [files.holds(name) for name in names] == [True, False, False, True]
    with pytest.raises(UserError, match=r"--cache_limit .*: lower something"):
        make_room(files.folder, mine, 9 * size, 9 * size, "lower something")
    with pytest.raises(UserError, match="do not fit on this disk"):
        make_room(files.folder, mine, 10**18, 10**19, "")
    assert files.holds(names[0]), "nothing is removed where it would not help"


def test_left_overs_of_a_crash_are_cleared_away(files):
    files.write("a" * 64, features(), (8, 8))
    old, new = (files.path("a" * 64).with_name(f".{name}.host.1") for name in "xy")
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    make_room(files.folder, [], 0, 10**9, "")
    assert not old.exists() and new.exists() and files.holds("a" * 64)


# --- a dataset that reads them -------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path):
    rng, found = np.random.default_rng(0), []
    for index, size in enumerate([(40, 60), (60, 44), (50, 50)]):
        mask = np.zeros(size, np.uint8)
        mask[9:25, 8:30] = 255
        pair = Pair(str(index), tmp_path / f"{index}.bmp", tmp_path / f"{index}.png")
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(pair.image_path)
        Image.fromarray(mask).save(pair.mask_path)
        found.append(pair)
    return found


def dataset_of(pairs, **options):
    options = {"augment": "standard", "seed": 5, "train": True, "views": 2} | options
    return SegmentationDataset(
        pairs, ReadOptions(), 64, PromptOptions(box_jitter=0.1), "original", **options
    )


def kept(dataset, files, needs_image=False) -> SegmentationDataset:
    """With random features of every picture in both views."""
    digests = [digest(pair, bool(dataset.drawn)) for pair in dataset.pairs]
    keeper = KeptViews(files, digests, dataset.drawn, needs_image)
    for index, _ in enumerate(dataset.pairs):
        for epoch in range(2):
            view, size = dataset.view_of(epoch), dataset.look(epoch, index).picture_size
            files.write(keeper.name(view, index), features(10 * view + index), size)
    return dataset.keeping(keeper)


def keys(epoch):
    return [SampleKey(epoch, index) for index in range(3)]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_a_batch_lies_in_memory_as_the_model_gave_it(pairs, files, order):
    """A kernel may round otherwise where numbers lie otherwise."""
    dataset = dataset_of(pairs, augment="none")
    keeper = KeptViews(files, ["0", "1", "2"], "", False)
    back = [order.index(axis) for axis in range(3)]
    whole = torch.stack([features(i).permute(order) for i in range(3)])  # as it lies in memory
    whole = whole.permute(0, *(axis + 1 for axis in back))
    for index in range(3):
        size = dataset.look(0, index).picture_size
        files.write(keeper.name(0, index), whole[index], size)
    (batch,) = make_loader(dataset.keeping(keeper), [keys(0)], 0)
    assert torch.equal(batch.features, whole) and batch.features.stride() == whole.stride()


@pytest.mark.parametrize("options", [{}, {"augment": "none"}, {"augment": "rotate"}, {"crop": 24}])
def test_all_but_the_image_is_as_it_was(pairs, files, options):
    """Targets, prompts and frames: though the picture's file is not even there."""
    plain = dataset_of(pairs, **options)
    keeping = kept(plain, files)
    expected = [collate([plain[key] for key in keys(epoch)]) for epoch in range(4)]
    for pair in pairs:
        pair.image_path.unlink()
    for epoch, before in enumerate(expected):
        (after,) = make_loader(keeping, [keys(epoch)], 0)
        assert after.image.shape == before.image.shape and after.image.stride() == (0, 0, 0, 0)
        assert torch.equal(after.target, before.target)
        assert torch.equal(after.prompts.boxes, before.prompts.boxes)
        assert torch.equal(after.frames.valid_size, before.frames.valid_size)
        assert torch.equal(after.frames.original_size, before.frames.original_size)
        view = plain.view_of(epoch)
        assert torch.equal(after.features, torch.stack([features(10 * view + i) for i in range(3)]))


def test_a_model_that_reads_the_image_too_gets_it(pairs, files):
    plain = dataset_of(pairs)
    (batch,) = make_loader(kept(plain, files, needs_image=True), [keys(1)], 0)
    assert torch.equal(batch.image, collate([plain[key] for key in keys(1)]).image)
    assert batch.features is not None


def test_views_repeat_and_prompts_do_not(pairs):
    dataset = dataset_of(pairs)
    items = [[dataset[SampleKey(epoch, index)] for index in range(3)] for epoch in range(5)]
    for index in range(3):
        for epoch in range(2, 5):
            again, first = items[epoch][index], items[epoch % 2][index]
            assert (again.image == first.image).all()
            assert (again.rows[0].prompt.box != first.rows[0].prompt.box).any()
    anew = dataset_of(pairs, views=0)
    assert any((anew[SampleKey(2, i)].image != items[0][i].image).any() for i in range(3))
    assert (anew[SampleKey(1, 0)].image == items[1][0].image).all(), "the draws are the same"


def test_a_batch_with_a_missing_file_is_read_without_features(pairs, files):
    """Another run may have removed it: slower, never wrong."""
    plain = dataset_of(pairs)
    keeping = kept(plain, files)
    files.path(keeping.kept.name(1, 2)).unlink()
    (batch,) = make_loader(keeping, [keys(1)], 0)
    assert batch.features is None and len(batch.inputs) == 3
    assert torch.equal(batch.image, collate([plain[key] for key in keys(1)]).image)


def test_names_follow_from_content_view_draw_and_key(pairs, files):
    def name(dataset, view=0, index=0, files=files):
        found = [digest(pair, bool(dataset.drawn)) for pair in dataset.pairs]
        return KeptViews(files, found, dataset.drawn, False).name(view, index)

    dataset = dataset_of(pairs)
    names = {
        name(dataset), name(dataset, view=1), name(dataset, index=1),
        name(dataset_of(pairs, seed=6)), name(dataset_of(pairs, augment="flip")),
        name(dataset_of(pairs, augment="none")), name(dataset_of(pairs, crop=24)),
        name(dataset, files=FeatureFiles(files.folder, "other", FORM)),
    }  # fmt: skip
    assert len(names) == 8
    still = dataset_of(pairs, augment="none")
    before = name(dataset), name(still)
    assert before == (name(dataset_of(pairs, views=3)), name(dataset_of(pairs, augment="none")))
    Image.fromarray(np.eye(50, dtype=np.uint8) * 255).resize((60, 40)).save(pairs[0].mask_path)
    assert name(dataset) != before[0], "whether a variant is given up depends on the mask"
    assert name(still) == before[1]
    Image.new("RGB", (60, 40)).save(pairs[0].image_path)
    assert name(still) != before[1]


def test_a_blank_image_travels_as_one_number(pairs, files):
    (batch,) = make_loader(kept(dataset_of(pairs), files), [keys(0)], 1)  # through a process
    assert isinstance(batch, Batch) and batch.image.untyped_storage().nbytes() == 1
    moved = batch.to(torch.device("meta"))
    assert moved.image.shape == (3, 3, 64, 64) and moved.image.stride() == (0, 0, 0, 0)
    assert moved.features.shape == (3, *FORM.shape)
