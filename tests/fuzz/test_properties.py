"""What holds for any input: pairs by name only, ids by the table only, options that read back."""

import io
import json
import math
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from fuzz_seeds import CHOICES, GROUPS
from fuzz_targets import pictures
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from samtune import flags
from samtune.config import NameOptions, ReadOptions
from samtune.data.coco import find_described, read_annotations
from samtune.data.codings import CODINGS, parse_colours
from samtune.data.decoding import Decoded
from samtune.data.files import find_pairs, natural
from samtune.data.lists import listed_pairs
from samtune.data.masks import mask_from
from samtune.data.shards import shard_pairs
from samtune.data.tar_files import index_tar
from samtune.errors import UserError
from samtune.gallery import file_below
from samtune.structures import IGNORE

ANY = settings(
    max_examples=100, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
FLAGS = ("--train_image_dir", "--train_mask_dir")
# Short names of few characters, so that many are alike, and share beginnings and ends.
STEM = st.text("ab01_-. ", min_size=1, max_size=5).filter(lambda s: s[0] not in "." and s.strip())
END = st.sampled_from([".png", ".jpg", ".PNG", ".tif", ".txt", ""])


def make(folder: Path, names) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


# --- pairing ---


def oracle(images: set[str], masks: set[str], read: NameOptions) -> dict[str, tuple[str, str]]:
    """Key -> (image, mask) of files that are named as `read` says; all of a side has a partner."""

    def keys(names, prefix, suffix):
        found = {}
        for name in names:
            stem = Path(name).stem
            assert stem.startswith(prefix) and stem.endswith(suffix)
            key = stem[len(prefix) : len(stem) - len(suffix)]
            assert key and key not in found
            found[key] = name
        return found

    of_image = keys(images, read.image_prefix, read.image_suffix)
    of_mask = keys(masks, read.mask_prefix, read.mask_suffix)
    assert of_image.keys() == of_mask.keys()
    return {key: (of_image[key], of_mask[key]) for key in of_image}


@ANY
@given(
    keys=st.sets(STEM, min_size=1, max_size=5),
    extra=st.sets(STEM, max_size=1),
    affixes=st.tuples(*[st.sampled_from(["", "", "a", "_m", "0"])] * 4),
    ends=st.tuples(END, END),
)
def test_pairs_under_given_affixes_are_those_of_the_oracle(keys, extra, affixes, ends):
    read = NameOptions(*affixes)
    with tempfile.TemporaryDirectory() as room:
        images = {read.image_prefix + key + read.image_suffix + ends[0] for key in keys | extra}
        masks = {read.mask_prefix + key + read.mask_suffix + ends[1] for key in keys}
        assume(not any(name.startswith(".") for name in images | masks))
        folders = make(Path(room) / "i", images), make(Path(room) / "m", masks)
        try:
            pairs = find_pairs(*folders, read, FLAGS)
        except UserError:
            return
        seen = {pair.id: (pair.image_path.name, pair.mask_path.name) for pair in pairs}
        if any(affixes) or {Path(n).stem for n in images} & {Path(n).stem for n in masks}:
            assert seen == oracle(images, masks, read)
        assert [pair.id for pair in pairs] == sorted(seen, key=natural)


@ANY
@given(
    keys=st.sets(STEM, min_size=2, max_size=5),
    affixes=st.tuples(*[st.sampled_from(["", "img_", "x", "-gt", "_0"])] * 4),
    strays=st.lists(STEM, max_size=1),
)
def test_pairs_under_guessed_affixes_share_what_is_left_of_their_names(keys, affixes, strays):
    """Whatever is guessed, image and mask differ by one beginning and one end, the same for all."""
    before, behind, mask_before, mask_behind = affixes
    images = {before + key + behind for key in keys} | set(strays)
    masks = {mask_before + key + mask_behind for key in keys}
    assume(not any(name.startswith(".") for name in images | masks))
    with tempfile.TemporaryDirectory() as room:
        folders = (
            make(Path(room) / "i", [f"{n}.png" for n in images]),
            make(Path(room) / "m", [f"{n}.png" for n in masks]),
        )
        try:
            pairs = find_pairs(*folders, NameOptions(), FLAGS)
        except UserError:
            return
    assert {pair.image_path.stem for pair in pairs} == images
    assert {pair.mask_path.stem for pair in pairs} == masks
    for side in ("image_path", "mask_path"):
        around = set()
        for pair in pairs:
            stem = getattr(pair, side).stem
            assert stem.count(pair.id) >= 1
            at = [i for i in range(len(stem)) if stem.startswith(pair.id, i)]
            around.add(frozenset((stem[:i], stem[i + len(pair.id) :]) for i in at))
        assert frozenset.intersection(*around), f"no one prefix and suffix fits: {around}"


@ANY
@given(st.lists(st.tuples(STEM, st.sampled_from([".png", ".mask.png", ".seg.jpg", ".txt"]))))
def test_members_of_a_tar_are_paired_by_their_keys(members):
    names = [stem + end for stem, end in members]
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / "0.tar"
        with tarfile.open(path, "w") as tar:
            for name in names:
                tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        try:
            pairs = shard_pairs([index_tar(str(path), {".png", ".jpg"})], ReadOptions(), "--s")
        except UserError:
            return
    for pair in pairs:
        image, mask = pair.image_path.member, pair.mask_path.member
        assert image.split(".")[0] == mask.split(".")[0] == pair.id
        assert mask.split(".")[1].lower() in ("mask", "seg") and len(image.split(".")) == 2
    used = [m.member for pair in pairs for m in (pair.image_path, pair.mask_path)]
    assert max(Counter(used).values()) == 1


ROW = st.sampled_from(["a.png", "b.png", "a_mask.png", "b_mask.png", "../pictures/a.png", "none"])


@ANY
@given(
    st.lists(st.lists(ROW, min_size=1, max_size=3), min_size=1, max_size=4),
    st.sampled_from([",", ", ", " ", "\t"]),
)
def test_a_list_pairs_what_stands_on_one_line(rows, between):
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / "list.txt"
        path.write_text("".join(between.join(row) + "\n" for row in rows))
        try:
            pairs = listed_pairs(path, pictures(), pictures(), "--train_list")
        except UserError:
            return
    told = [[pictures() / name for name in row] for row in rows]
    assert [[pair.image_path, pair.mask_path] for pair in pairs] == told
    assert len({pair.id for pair in pairs}) == len(pairs)


@ANY
@given(st.lists(st.text("0123456789ab٣", max_size=6), max_size=6), st.integers(4300, 5000))
def test_natural_order_is_that_of_the_numbers(keys, digits):
    numbers = [key for key in keys if key.isascii() and key.isdigit()]
    assert sorted(numbers, key=natural) == sorted(numbers, key=lambda key: (int(key), key))
    assert sorted([*keys, "9" * digits], key=natural)  # more digits than int() takes


# --- what masks mean ---


@ANY
@given(
    name=st.sampled_from([name for name, rule in CODINGS.items() if hasattr(rule, "entries")]),
    values=st.lists(st.integers(-2, 300), min_size=3, max_size=12),
    kind=st.sampled_from([np.uint8, np.int16, np.float32]),
)
def test_a_table_gives_the_ids_it_holds_or_says_no(name, values, kind):
    """The oracle looks every pixel up by itself."""
    rule = CODINGS[name]
    read = ReadOptions(mask_coding=name, num_classes=rule.num_classes)
    pixels = np.array(values[: len(values) // 3 * 3]).clip(0 if kind is np.uint8 else -2, 255 if
                      kind is np.uint8 else 300).astype(kind)  # fmt: skip
    array = pixels.reshape(1, -1, 3) if rule.coloured else pixels.reshape(1, -1)
    check_table(rule, read, array)


@ANY
@given(
    colours=st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=2, max_size=4, unique=True),
    pixels=st.lists(st.tuples(*[st.integers(0, 300)] * 3), min_size=1, max_size=6),
    deep=st.booleans(),
)
def test_own_colours_are_met_exactly(colours, pixels, deep):
    """Also 16-bit ones: (0, 256, 0) is not (1, 0, 0)."""
    text = ";".join(",".join(map(str, colour)) for colour in colours)
    rule = parse_colours(text)
    kind = np.uint16 if deep else np.uint8
    known = [colours[i % len(colours)] for i, _ in enumerate(pixels)]
    for chosen in (pixels, known):
        array = np.array(chosen)[None] % (2**16 if deep else 2**8)
        check_table(rule, ReadOptions(class_colours=text, num_classes=rule.num_classes),
                    array.astype(kind))  # fmt: skip


def check_table(rule, read: ReadOptions, array: np.ndarray) -> None:
    def id_of(pixel):
        if rule.by == "grey":
            return rule.entries.get(float(pixel))
        red, green, blue = map(float, pixel)
        if not all(0 <= v <= 255 for v in (red, green, blue)):
            return None
        value = red + green + blue if rule.by == "sum" else (red * 256 + green) * 256 + blue
        return rule.entries.get(value)

    wanted = [id_of(pixel) for pixel in array[0]]
    try:
        ids, _ = mask_from(Decoded(array, lossy=False, turned=False), read, "m.png")
    except UserError:
        assert None in wanted
    else:
        assert ids[0].tolist() == wanted


@ANY
@given(
    values=st.lists(st.sampled_from([0, 1, 2, 7, 255, 256, 0.5, math.nan, -1.0]), min_size=1),
    classes=st.integers(1, 300),
    ignored=st.sampled_from([255, 7, -1, 256]),
    kind=st.sampled_from([np.uint8, np.uint16, np.float64, bool]),
)
@pytest.mark.filterwarnings("ignore:invalid value")  # NaN as a whole number, made here
def test_ids_are_what_the_file_holds_or_it_is_refused(values, classes, ignored, kind):
    array = np.array(values, float)[None].astype(kind)
    read = ReadOptions(num_classes=classes, ignore_index=ignored)
    try:
        ids, _ = mask_from(Decoded(array, lossy=False, turned=False), read, "m.png")
    except UserError:
        return
    assert classes <= IGNORE
    for value, id in zip(array[0].tolist(), ids[0].tolist(), strict=True):
        if classes == 1:
            assert id == (value > 0)
        else:
            assert id == (IGNORE if value == ignored else value)


# --- annotations ---

NUMBER = st.one_of(st.integers(-3, 12), st.floats(allow_nan=True), st.just(10**9), st.none())
SEGMENTATION = st.one_of(
    st.none(),
    st.lists(st.lists(NUMBER, max_size=8), max_size=2),
    st.lists(st.lists(st.integers(0, 5), min_size=6, max_size=8), min_size=1, max_size=2),
    st.fixed_dictionaries({
        "size": st.sampled_from([[4, 5], [5, 4], [4], None, [4000, 5000]]),
        "counts": st.one_of(
            st.lists(st.integers(-1, 20), max_size=5), st.text(max_size=8), st.just([4, 4, 12]),
            st.text("0123456789:;<=>?@ABCPQRSTo", max_size=8), st.none(), st.just("x" * 40),
        ),
    }),
)  # fmt: skip
LABEL = st.sampled_from([0, 1, 2, "1", None, [1]])


@ANY
@given(
    files=st.lists(
        st.sampled_from(["a.png", "b.png", "./a.png", "../x", "/etc/hosts", "\0", "\ud800", 5]),
        max_size=3,
    ),
    sizes=st.lists(st.sampled_from([4, 5, 0, -1, 10**6, 4.0, None]), min_size=6, max_size=6),
    ids=st.lists(LABEL, min_size=3, max_size=3),
    drawn=st.lists(st.tuples(SEGMENTATION, LABEL, LABEL, st.booleans()), max_size=3),
)
def test_annotations_lie_within_the_images_they_are_of(files, sizes, ids, drawn):
    images = [
        {"id": id, "file_name": name, "height": height or 4, "width": width or 5}
        for id, name, height, width in zip(ids, files, sizes[:3], sizes[3:], strict=False)
    ]
    annotations = [
        {"id": index, "image_id": image, "category_id": kind, "iscrowd": int(crowd),
         "segmentation": shape}
        for index, (shape, image, kind, crowd) in enumerate(drawn)
    ]  # fmt: skip
    content = {"images": images, "annotations": annotations, "categories": []}
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / "a.json"
        path.write_text(json.dumps(content))
        try:
            pairs = find_described(pictures(), path, FLAGS[0])
        except UserError:
            return
        assert len({pair.id for pair in pairs}) == len(pairs) == len(images)
        for pair, image in zip(pairs, images, strict=True):
            assert pair.image_path.resolve().parent == pictures().resolve()
            try:
                found = read_annotations(path, pair.id)
            except UserError:
                continue
            own = [a for a in annotations if a["image_id"] == image["id"] and not a["iscrowd"]]
            assert [name.split(":")[-1] for name in found.names] == [str(a["id"]) for a in own]
            assert all(m.shape == (image["height"], image["width"]) for m in found.masks)


# --- options and names ---


TEXTS = st.text(max_size=8).filter(lambda text: "\0" not in text)
VALUES = {bool: st.booleans(), int: st.integers(-5, 10**6), float: st.floats(allow_nan=False),
          str: TEXTS}  # fmt: skip
FIELDS = {
    name: VALUES[type(field.default)]
    for group in GROUPS[:-1]  # an adapter's options have rules of their own
    for name, field in group.__dataclass_fields__.items()
    if type(field.default) in VALUES and not field.metadata.get("choices") and name not in CHOICES
}
ANY_LINE = st.sampled_from(sorted(FIELDS)).flatmap(lambda n: st.tuples(st.just(n), FIELDS[n]))


@ANY
@given(st.lists(ANY_LINE, max_size=5).map(dict))
def test_options_read_back_from_their_own_file(given_values):
    """Any value of the right type; text may hold whatever YAML can."""
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / "c.yaml"
        path.write_text(yaml.safe_dump(given_values), encoding="utf-8")
        try:
            read = flags.parse("p", "", GROUPS, ["--config", str(path)], choices=CHOICES).instances
        except UserError as error:  # of the values drawn here only these are no text of their flag
            assert "activation_checkpointing" in str(error) or "batch_size" in str(error), error
            return
    found = flags.dump(read)
    assert {name: found[name] for name in given_values} == given_values


PART = st.one_of(st.text(max_size=6), st.sampled_from(["..", ".", "", "a" * 300, "\0", "\ud800"]))


@ANY
@given(
    st.lists(PART, min_size=1, max_size=4).map("/".join),
    st.one_of(st.just(""), st.lists(PART, max_size=3).map("/".join).map("#{}".format)),
)
def test_a_name_becomes_a_file_below_the_folder(image_id, asked):
    with tempfile.TemporaryDirectory() as room:
        root = Path(room).resolve()
        path = root / file_below(image_id + asked, image_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        assert root in path.resolve().parents and path.suffix == ".png"


@ANY
@given(st.lists(st.sampled_from(["a/b", "a_b", "a#b", "..", "_", "a#/b", "a#_b"]), unique=True))
def test_different_names_become_different_files(names):
    assert len({file_below(name, name.split("#")[0]) for name in names}) == len(names)


def test_plain_names_stay_as_they_are():
    assert file_below("s1/0001", "s1/0001") == "s1/0001.png"
    assert file_below("s1/0001#car:3", "s1/0001") == "s1/0001#car:3.png"
