"""Every data set in every layout, read end to end, and what is said where one is not right."""

from dataclasses import fields, replace

import numpy as np
import pytest
from miniatures import MINIATURES, SIZE, Miniature, bundle_camo, camvid, cityscapes, istd, synapse

from samtune.config import ReadOptions, TrainDataOptions
from samtune.data.catalog import (
    find_dataset,
    find_joined,
    has_split,
    locate,
    names_in,
    read_options,
)
from samtune.data.catalog_rows import DATASETS
from samtune.data.codings import CODINGS
from samtune.data.files import Pair
from samtune.data.objects import classes_asked
from samtune.data.samples import read_sample
from samtune.data.scan import scan_pairs
from samtune.data.splits import hold_out
from samtune.errors import UserError
from samtune.structures import IGNORE

PROTOCOLS = {"cod", "sod", "shadow", "polyp", "semantic", "synapse", "binary"}
LAYOUTS = [(name, i) for name, makers in MINIATURES.items() for i in range(len(makers))]


def test_every_layout_has_a_miniature():
    assert list(MINIATURES) == list(DATASETS)
    for name, row in DATASETS.items():
        assert len(MINIATURES[name]) >= len(row.layouts), name


@pytest.mark.parametrize(("name", "which"), LAYOUTS, ids=lambda value: str(value))
def test_a_data_set_is_read_end_to_end(tmp_path, name, which):
    mini: Miniature = MINIATURES[name][which](tmp_path)
    found = locate(name, tmp_path)
    assert found.layout is DATASETS[name].layouts[which] and found.root == mini.root
    read = read_options([name], tmp_path, ReadOptions())
    assert read == read_options([name], tmp_path, read), "as a run that goes on asks again"
    seen = {}
    for split in ("train", "val", "test"):
        if not mini.truth["train"] and split != "test":
            with pytest.raises(UserError, match=f"{split} split: .* is a test set; use it by"):
                find_dataset(name, tmp_path, split, 0.2)
            continue
        seen[split] = find_dataset(name, tmp_path, split, 0.2)
        assert seen[split] == find_dataset(name, tmp_path, split, 0.2) and seen[split]
        report = scan_pairs(seen[split], read)
        report.raise_problems()
        assert report.images == len(seen[split]) and report.sizes == {SIZE: report.images}
        if split in mini.truth and mini.truth[split] and split != "train":
            assert {pair.id for pair in seen[split]} == set(mini.truth[split])
    stacked = "stacks" in found.layout.title  # ids are numbers of rows, the same in each split
    _check_splits(mini, found.layout, seen, stacked)
    for split, pairs in seen.items():
        for pair in pairs:
            of_split = split if stacked or pair.id in mini.truth[split] else "train"
            sample = read_sample(pair, read).sample
            assert np.array_equal(sample.mask, mini.truth[of_split][pair.id]), pair
            assert sample.image.shape == (*SIZE, 3) and sample.image.dtype == np.uint8
            assert pair.group == mini.groups[pair.id]


def _check_splits(mini, layout, seen, stacked):
    """Nothing is in two splits, nothing is lost, and held-out parts share no group."""
    if stacked:
        files = [{pair.image_path.file for pair in pairs} for pairs in seen.values()]
        assert len(set.union(*files)) == 3
        return
    ids = [pair.id for pairs in seen.values() for pair in pairs]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id for of_split in mini.truth.values() for id in of_split}
    if "val" not in layout.splits and "val" in seen:
        held, kept = ({p.group or p.id for p in seen[split]} for split in ("val", "train"))
        assert not held & kept
        total = len(seen["val"]) + len(seen["train"])
        assert 0.2 * total <= len(seen["val"]) < 0.6 * total


def test_rows_are_complete_and_readable():
    known = {f.name for f in fields(ReadOptions)}
    for name, row in DATASETS.items():
        assert row.protocol in PROTOCOLS and row.splits and row.licence and row.folders, name
        assert not row.colours or len(row.colours) == row.num_classes, name
        for layout in row.layouts:
            assert layout.read.keys() <= known and layout.splits, name
            assert layout.read.get("mask_coding", "auto") in {"auto", *CODINGS}
            assert {"train", "test"} >= layout.splits.keys() - {"val"}


def test_flags_name_what_there_is():
    """config.py knows no data set; its help and choices are compared here."""
    coding = next(f for f in fields(ReadOptions) if f.name == "mask_coding")
    assert coding.metadata["choices"] == ("auto", *CODINGS)
    listed = next(f for f in fields(TrainDataOptions) if f.name == "dataset").metadata["help"]
    assert listed.split("'+': ")[1].split(", ") == list(DATASETS)


def test_data_sets_are_found_in_a_folder_of_many(tmp_path):
    camvid(tmp_path / "CamVid")
    istd(tmp_path / "ISTD")
    assert locate("camvid", tmp_path).root == tmp_path / "CamVid"
    assert locate("istd", tmp_path).root == tmp_path / "ISTD"
    assert locate("camvid", tmp_path / "CamVid").root == tmp_path / "CamVid"


def test_joined_data_sets_keep_their_names(tmp_path):
    bundle_camo(tmp_path)
    names = names_in("cod10k+camo", "+", "--dataset")
    train = find_joined(names, tmp_path, "train", 0.25)
    val = find_joined(names, tmp_path, "val", 0.25)
    assert len(train) == 18 and len(val) == 6
    ids = {pair.id for pair in (*train, *val)}
    assert len(ids) == 24 and {id.split("/")[0] for id in ids} == {"cod10k", "camo"}
    alone = find_dataset("camo", tmp_path, "val", 0.25)
    assert {f"camo/{pair.id}" for pair in alone} <= {pair.id for pair in val}
    assert read_options(names, tmp_path, ReadOptions()).mask_coding == "above128"


def test_data_sets_of_other_classes_are_not_joined(tmp_path):
    camvid(tmp_path / "CamVid")
    istd(tmp_path / "ISTD")
    with pytest.raises(UserError, match="camvid and istd cannot be joined: --mask_coding is"):
        read_options(["camvid", "istd"], tmp_path, ReadOptions())


def test_what_is_missing_is_said_with_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"--data_root .*nowhere: there is no such folder"):
        locate("camvid", tmp_path / "nowhere")
    with pytest.raises(UserError) as error:
        locate("camvid", tmp_path)
    said = str(error.value)
    assert "train with trainannot" in said and "list/train_d.txt" in said and "CamVid" in said
    mini = camvid(tmp_path)
    for file in (*(tmp_path / "test").iterdir(), *(tmp_path / "testannot").iterdir()):
        file.unlink()
    (tmp_path / "test").rmdir()
    assert not has_split("camvid", tmp_path, "test") and has_split("camvid", tmp_path, "val")
    with pytest.raises(UserError, match=r"camvid, test split: not in .*looked for test with"):
        find_dataset("camvid", tmp_path, "test")
    (tmp_path / "trainannot" / f"{next(iter(mini.truth['train']))}.png").unlink()
    with pytest.raises(UserError, match=r"train split: .*without a mask: 0001TP_006690\.png"):
        find_dataset("camvid", tmp_path, "train")
    with pytest.raises(UserError, match=r"camvit: no such data set; did you mean camvid\?"):
        names_in("camvit", "+", "--dataset")
    with pytest.raises(UserError, match="stands there twice"):
        names_in("camo+camo", "+", "--dataset")


def test_flags_that_contradict_a_data_set_are_refused(tmp_path):
    cityscapes(tmp_path)
    for name, value in (
        ("num_classes", 20), ("ignore_index", 0), ("mask_suffix", "_x"), ("class_names", "a,b"),
        ("mask_threshold", 3), ("mask_coding", "btcv"), ("class_colours", "0,0,0;1,1,1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"--{name} .*the data set cityscapes"):
            read_options(["cityscapes"], tmp_path, replace(ReadOptions(), **{name: value}))
    assert read_options(["cityscapes"], tmp_path, ReadOptions(resize="squash")).resize == "squash"


def test_a_threshold_of_ones_own_replaces_the_cut(tmp_path):
    """TS-SAM takes every grey value for the object; the default is the literature's 128."""
    istd(tmp_path)
    read = read_options(["istd"], tmp_path, ReadOptions(mask_threshold=1))
    assert (read.mask_coding, read.mask_threshold) == ("auto", 1)
    pairs = find_dataset("istd", tmp_path, "test")
    cut = read_options(["istd"], tmp_path, ReadOptions())
    more, mask = (read_sample(pairs[0], r).sample.mask for r in (read, cut))
    assert more.sum() == mask.sum() + 2  # the two pixels of 100
    again = read_options(["istd"], tmp_path, replace(cut, mask_threshold=1))
    assert again == read


def test_hold_out_takes_whole_groups_and_follows_no_order():
    pairs = [Pair(f"{g}-{i}", "", "", f"g{g}") for g in range(20) for i in range(1 + g % 3)]
    kept, held = hold_out(pairs, 0.25, "--val_share")
    assert sorted(kept + held) == sorted(pairs)
    assert not {p.group for p in kept} & {p.group for p in held}
    assert 0.25 <= len(held) / len(pairs) < 0.35
    groups = [int(p.group[1:]) for p in held]
    assert max(groups) - min(groups) > len(set(groups)), "a block of neighbours was taken"
    assert hold_out(pairs[::-1], 0.25, "--val_share")[1] == held[::-1]
    for share in (0, 1, -0.5):
        with pytest.raises(UserError, match=r"--val_share .* between 0 and 1"):
            hold_out(pairs, share, "--val_share")
    with pytest.raises(UserError, match="1 group"):
        hold_out(pairs[:1], 0.5, "--val_share")


def test_volumes_are_sliced_in_order_and_scaled_as_declared(tmp_path):
    synapse(tmp_path)
    pairs = find_dataset("synapse", tmp_path, "test")
    assert [pair.id for pair in pairs[:2]] == ["case0001_slice000", "case0001_slice001"]
    assert str(pairs[1].mask_path).endswith("case0001.npy.h5[label][1]")
    read = read_options(["synapse"], tmp_path, ReadOptions())
    image = read_sample(pairs[0], read).sample.image
    assert image[0, 0].tolist() == [0, 0, 0] and image[-1, -1].tolist() == [255] * 3
    middle = read_sample(pairs[0], read).sample.image[16, 0, 0]
    assert abs(int(middle) - 128) <= 1, "0..1 is linear; a percentile would stretch it"


def test_class_shares_are_remarked(tmp_path):
    mini = camvid(tmp_path)
    read = read_options(["camvid"], tmp_path, ReadOptions())
    report = scan_pairs(find_dataset("camvid", tmp_path, "train"), read)
    masks = np.stack(list(mini.truth["train"].values()))
    sky = (masks == 0).sum() / (masks != IGNORE).sum()
    assert f"0 sky {sky:.2%} in 3" in report.remarks[0]
    assert any(line.startswith(f"{(masks == IGNORE).mean():.2%} of the pixels are ignored")
               for line in report.remarks)  # fmt: skip


def test_where_every_class_is_an_object_all_are_asked_about_unless_a_flag_says_otherwise(tmp_path):
    cityscapes(tmp_path)
    usual = read_options(["cityscapes"], tmp_path, ReadOptions())
    assert usual.background == -1 and 0 in classes_asked(usual)
    assert read_options(["cityscapes"], tmp_path, usual) == usual, "as a run that goes on reads it"
    assert read_options(["cityscapes"], tmp_path, ReadOptions(background=3)).background == 3
