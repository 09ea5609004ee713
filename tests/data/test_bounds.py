"""Files that claim too much: refused by their headers, in words, before anything is decoded."""

import io
import json
import math
import os
import re
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from samtune import flags
from samtune.config import ModelOptions, NameOptions, ReadOptions, Size, TrainDataOptions
from samtune.data import limits
from samtune.data.arrays import ArraySlice, count_slices, read_slice
from samtune.data.coco import find_described, read_annotations, run_lengths
from samtune.data.codings import coding_of
from samtune.data.decoding import Decoded, decode
from samtune.data.files import find_pairs, natural
from samtune.data.images import parse_range, read_image
from samtune.data.layouts import Lists
from samtune.data.lists import listed_pairs
from samtune.data.masks import mask_from
from samtune.data.shards import named_shards
from samtune.data.tar_files import index_tar
from samtune.engine import records
from samtune.errors import UserError
from samtune.tensor_files import read_state_dict

READ = ReadOptions()


@pytest.fixture
def undecoded(monkeypatch):
    """Whoever decodes a picture fails the test."""

    def decoded(*_):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    monkeypatch.setattr(cv2, "imdecode", decoded)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(
        ">I", zlib.crc32(kind + content)
    )  # fmt: skip


def png_of(width, height, bits=8, colour=2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def tiff_of(width, height, kind=np.uint8) -> bytes:
    """A TIFF of colour whose header tells of another size than it has."""
    content = bytearray(cv2.imencode(".tif", np.zeros((4, 4, 3), kind))[1].tobytes())
    (directory,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, directory)
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        (tag,) = struct.unpack_from("<H", content, entry)
        if tag in (256, 257):
            size = width if tag == 256 else height
            struct.pack_into("<HII", content, entry + 2, 4, 1, size)
    return bytes(content)


BOMBS = {
    "png": png_of(60_000, 60_000),
    "png of 16 bits": png_of(60_000, 60_000, bits=16),
    "png far beyond": png_of(2**31 - 1, 2**31 - 1),
    "tiff": tiff_of(60_000, 60_000),
    "tiff of float colour": tiff_of(60_000, 60_000, np.float32),
    "pgm": b"P5 60000 60000 255\n" + bytes(100),
    "bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 200, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0,
                               0, 0, 0, 0) + bytes(100),
    "gif": b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b"," + struct.pack(
        "<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\x02\x02\x4c\x01\x00;",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BOMBS)
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, undecoded, kind):
    path = tmp_path / f"bomb.{kind.split()[0]}"
    path.write_bytes(BOMBS[kind])
    with pytest.raises(UserError, match=r"bomb\.\w+: .*pixels are more than the 268,435,456") as e:
        decode(path)
    assert re.search("60000 x 60000|3,600,000,000|4,611,686,014,132,420,609", str(e.value))


def test_a_part_of_a_png_longer_than_the_file_gets_no_room(tmp_path, monkeypatch):
    """OpenCV would make room for 4 GB; Pillow reads what is there and is content."""
    deep = cv2.imencode(".png", np.zeros((4, 5, 3), np.uint16))[1].tobytes()
    at = deep.index(b"IDAT") - 4
    (tmp_path / "more.png").write_bytes(deep + b"\xff" * 100)  # behind the end anything may lie
    assert decode(tmp_path / "more.png").array.shape == (4, 5, 3)
    (tmp_path / "a.png").write_bytes(deep[:at] + b"\xff\xff\xff\xc8" + deep[at + 4 :])
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(UserError, match="a part of it is longer than the file"):
        decode(tmp_path / "a.png")


def test_the_bound_itself_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MOST_PIXELS", 20)
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "fits.png")
    Image.fromarray(np.zeros((3, 7), np.uint8)).save(tmp_path / "above.png")
    assert read_image(tmp_path / "fits.png", READ).shape == (4, 5, 3)
    with pytest.raises(UserError, match="7 x 3 pixels are more than the 20"):
        read_image(tmp_path / "above.png", READ)


def test_a_picture_in_a_program_is_not_run(tmp_path, monkeypatch):
    """EPS: Pillow would hand it to Ghostscript, whatever the file is called."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("it was run"))
    path = tmp_path / "a.png"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 4\n%%EndComments\n(x) print\n%%EOF\n"
    )
    with pytest.raises(UserError, match="not a readable image"):
        decode(path)


def test_no_memory_is_said_of_the_file(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a.png")

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", full)
    with pytest.raises(UserError, match=r"a\.png: decoding it takes more memory than there is"):
        decode(tmp_path / "a.png")


# --- arrays ---


def test_arrays_are_bounded_by_shape_and_bytes(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.h5", "w") as file:  # nothing of it is stored
        file.create_dataset("image", (2, 100_000, 100_000), "u1", chunks=(1, 100, 100))
        file["nothing"] = h5py.Empty("f")
    with pytest.raises(UserError, match="100000 x 100000 pixels are more"):
        read_slice(ArraySlice(tmp_path / "a.h5", "image", 0))
    for look in (count_slices, lambda p, name: read_slice(ArraySlice(p, name))):
        with pytest.raises(UserError, match=r"an array of shape \(\)"):
            look(tmp_path / "a.h5", "nothing")
    monkeypatch.setattr(limits, "MOST_BYTES", 1000)
    np.savez_compressed(tmp_path / "a.npz", image=np.zeros((100, 100), np.uint8))
    with pytest.raises(UserError, match=r"a\.npz\[image\]: 10,128 bytes are more than the 1,000"):
        read_slice(ArraySlice(tmp_path / "a.npz", "image"))


def test_an_npy_that_claims_more_than_it_has(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 4), np.uint8))
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content.replace(b"(2, 3, 4)", b"(2,9**9,9)"[:9]))
    with pytest.raises(UserError, match="cannot be read as arrays"):
        read_slice(ArraySlice(tmp_path / "a.npy", "", 0))


@pytest.mark.parametrize("content", [b"text", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b""])
@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.h5"])
def test_files_that_are_no_arrays(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}"):
        count_slices(tmp_path / name, "image")


def test_a_member_of_an_npz_that_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("image", "text")
    with pytest.raises(UserError, match="cannot be read as arrays"):
        read_slice(ArraySlice(tmp_path / "a.npz", "image"))


# --- masks ---


@pytest.mark.parametrize(
    ("array", "read"),
    [
        (np.array([[0, np.nan]]), ReadOptions(mask_coding="above128")),
        (np.array([[[0, 256, 0]]], np.uint16),
         ReadOptions(class_colours="0,0,0;1,0,0", num_classes=2)),
        (np.array([[[0.5, 0, 0]]]), ReadOptions(class_colours="0,0,0;1,0,0", num_classes=2)),
        (np.array([[[-(2**31), 2**31 - 1, 0]]], np.int32), READ),
        (np.array([[299]], np.uint16), ReadOptions(num_classes=300)),
    ],
)  # fmt: skip
def test_values_that_would_become_others_are_refused(array, read):
    with pytest.raises(UserError):
        mask_from(Decoded(array, lossy=False, turned=False), read, "m.png")


def test_a_mask_of_bits_in_three_channels():
    bits = np.repeat(np.array([[True, False]])[..., None], 3, axis=2)
    assert mask_from(Decoded(bits, False, False), READ, "m.npz")[0].tolist() == [[1, 0]]


@pytest.mark.parametrize("number", [0, -1, 256, 10**9])
def test_the_number_of_classes_is_bounded(number):
    with pytest.raises(UserError, match=r"--num_classes .*from 1 to 255"):
        coding_of(ReadOptions(num_classes=number))


@pytest.mark.parametrize("text", ["-inf,inf", "nan,1", "-1e308,1e308"])
def test_a_range_is_of_numbers(text):
    with pytest.raises(UserError, match="--intensity_range"):
        parse_range(text)


# --- annotations ---


def coco(folder: Path, images=None, **annotation) -> Path:
    (folder / "a.png").touch()
    image = {"id": 1, "file_name": "a.png", "height": 40, "width": 50}
    images = [image] if images is None else [image | change for change in images]
    annotations = [{"id": 7, "image_id": 1, "category_id": 1, **annotation}] if annotation else []
    path = folder / "a.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))
    return path


@pytest.mark.parametrize(
    "segmentation",
    [
        [[0, 0, 10**9, 0, 10**9, 10**9]],
        [[0, 0, math.inf, 0, 3, 3]],
        [[0, 0, 49, 39] * 60_000],
        [[0, 0, 4, 4]],
        [["0", 0, 4, 4, 5, 5]],
        {"size": [4000, 5000], "counts": [20_000_000]},
        {"size": [40, 50], "counts": [1000, 9000]},
        {"size": [40, 50], "counts": "zzzzzzzzzzzzzzzzzzzz0"},
        {"size": [40, 50], "counts": [-1, 2001]},
        {"counts": [2000]},
        [],
        None,
        7,
    ],
    ids=str,
)
def test_a_segmentation_that_would_not_fit_is_never_drawn(tmp_path, segmentation):
    path = coco(tmp_path, segmentation=segmentation)
    with pytest.raises(UserError, match="annotation 7 has no readable segmentation"):
        read_annotations(path, "a.png")


@pytest.mark.parametrize("seed", range(5))
def test_compressed_runs_are_those_of_pycocotools(tmp_path, seed):
    mask_utils = pytest.importorskip("pycocotools.mask")
    mask = np.random.default_rng(seed).random((40, 50)) < 0.1 * seed  # 0: an empty one
    counts = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    path = coco(tmp_path, segmentation={"size": [40, 50], "counts": counts})
    assert (read_annotations(path, "a.png").masks[0] == mask).all()
    assert sum(run_lengths(counts)) == mask.size and sum(run_lengths(counts)[1::2]) == mask.sum()


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([{"file_name": "../a.png"}], "leads out of its folder"),
        ([{"file_name": "/etc/hosts"}], "leads out of its folder"),
        ([{"file_name": "a\0.png"}], "is no name of a file"),
        ([{"file_name": "\ud800.png"}], "is no name of a file"),
        ([{"file_name": 5}], "is no name of a file"),
        ([{"height": 10**6, "width": 10**6}], "pixels are more"),
        ([{"height": -1}], "there is no picture"),
        ([{"height": "40"}], "gives a.png the size"),
        ([{}, {"id": 2}], "describes a.png twice"),
        ([{}, {"file_name": "b.png"}], "two images as number 1"),
        ([{"id": [1]}], "no COCO annotation file"),
    ],
)
def test_images_that_annotations_could_confuse(tmp_path, images, said):
    with pytest.raises(UserError, match=said):
        find_described(tmp_path, coco(tmp_path, images), "--train_image_dir")


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"\xff\xfe", b"5", b'{"images": 5}', b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_json_that_is_something_else(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match="no COCO annotation file"):
        find_described(tmp_path, tmp_path / "a.json", "--train_image_dir")


# --- tars and lists ---


def headers(*infos: tarfile.TarInfo) -> bytes:
    return b"".join(info.tobuf(tarfile.GNU_FORMAT) for info in infos)


def member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


PAX = tarfile.XHDTYPE
TARS = {
    "negative size": (headers(member("a.png", -512)), "ends within the member|damaged"),
    "negative header": (headers(member("x", -512, PAX), member("a.png", 0)), "header of -"),
    "giant header": (headers(member("x", 2**30, PAX)), "header of 1073741824 bytes"),
    "giant name": (headers(member("x", 2**40, tarfile.GNUTYPE_LONGNAME)), "header of \\d+ bytes"),
    "headers of headers": (headers(member("x", 0, PAX)) * 3000, "damaged"),
    "huge number": (headers(member("x", 6000, PAX)) + b"9" * 6000 + bytes(144), "damaged"),
    "nameless": (headers(member("a\0b.png", 0)), ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", TARS)
def test_a_tar_whose_headers_lie(tmp_path, kind):
    content, said = TARS[kind]
    path = tmp_path / "0.tar"
    path.write_bytes(content + bytes(10_240))
    if not said:
        assert [m.member for m in index_tar(str(path), {".png"}).members] == []
        return
    with pytest.raises(UserError, match=f"^{path}.*({said})"):
        index_tar(str(path), {".png"})


def test_a_member_that_is_no_picture_by_its_size(tmp_path):
    path = tmp_path / "0.tar"
    with path.open("wb") as file:  # a file with a hole
        file.write(headers(member("a.png", 2**32)))
        file.truncate(512 + 2**32 + 10_240)
    with pytest.raises(UserError, match=r"0\.tar\[a\.png\]: 4,294,967,296 bytes are more"):
        index_tar(str(path), {".png"})


@pytest.mark.parametrize(
    "text", ["{0..99999}" * 4, "{a,b}" * 200, "{0.." + "9" * 5000 + "}", "{" * 100_000], ids=len
)
def test_braces_that_stand_for_more_than_there_can_be(text):
    with pytest.raises(UserError, match="--train_shards"):
        named_shards(text, "--train_shards")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'"' + b"x" * 200_000 + b'",b.png', "cannot be read"),
        (b"a" * 5000 + b".png,b.png", "there is no such file"),
        (b"a\0.png,b.png", "cannot be read|there is no such file"),
        (b"\xff,\xff", "cannot be read"),
    ],
    ids=["field", "long name", "zero byte", "no text"],
)
def test_lists_of_what_no_file_is_called(tmp_path, content, said):
    (tmp_path / "l.csv").write_bytes(content)
    with pytest.raises(UserError, match=said):
        listed_pairs(tmp_path / "l.csv", tmp_path, tmp_path, "--train_list")


def test_ids_of_a_named_sets_list_lead_nowhere(tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "up.png").touch()
    for name in ("images.txt", "masks.txt"):
        (tmp_path / name).write_text("../up.png\n")
    assert [pair.id for pair in Lists("images.txt", "masks.txt", "image").pairs(tmp_path)] == ["up"]
    (tmp_path / "images.txt").write_text(f"{tmp_path}/up.png\n")
    (pair,) = Lists("images.txt", "masks.txt", "image").pairs(tmp_path)
    assert not pair.id.startswith("/") and ".." not in pair.id


def test_a_name_that_is_no_text_is_refused(tmp_path):
    for folder in ("i", "m"):
        (tmp_path / folder).mkdir()
        Path(os.fsdecode(bytes(tmp_path / folder) + b"/\xff.png")).touch()
    with pytest.raises(UserError, match="is no UTF-8 text; rename it"):
        find_pairs(tmp_path / "i", tmp_path / "m", NameOptions(), ("--a", "--b"))


def test_names_of_thousands_of_digits_are_in_order():
    assert sorted(["9" * 5000, "1" + "0" * 5000, "7"], key=natural)[0] == "7"


# --- options, records, checkpoints ---

BILLION = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train_list: " + "[" * 5000, "cannot be read|not valid YAML"),
        (BILLION.replace("i:", "train_list:"), "expected a number"),
        ("train_list: 2001-13-41", "cannot be read"),
        ("cache_limit: !!float x", "cannot be read"),
        ("cache_limit: .nan", "expected a number, got"),
        ("train_list: !!binary aGVsbG8=", "expected a number"),
        ('train_list: "a\\0b"', "expected a number"),
        ('train_list: "\\ud800"', "expected a number|not valid YAML"),
        ("[1]: 2", "not valid YAML|name: value"),
        ("5: 2", "name: value"),
        ("augment_views: 0x" + "f" * 5000, "expected|Exceeds|limit"),
        ("crop: 99999", "more than 16384 pixels a side"),
        ("crop: " + "9" * 50, "expected a number or HEIGHTxWIDTH"),
        ("train_list: " + "x" * 2_000_000, "too large"),
    ],
    ids=lambda text: text[:24],
)
@pytest.mark.parametrize("door", ["parse", "peek"])
def test_options_that_no_flag_could_say(tmp_path, text, said, door):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        if door == "peek":
            flags.peek(["--config", str(path)], "crop", "")
        flags.parse("p", "", [TrainDataOptions], ["--config", str(path)])
    assert len(str(error.value)) < 2000


def test_an_empty_line_of_options_is_empty_text(tmp_path):
    (tmp_path / "c.yaml").write_text("train_list:\ncrop:\n")
    read = flags.parse("p", "", [TrainDataOptions], ["--config", f"{tmp_path}/c.yaml"])
    assert read.instances == [TrainDataOptions()]
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not valid YAML"):
        flags.parse("p", "", [TrainDataOptions], ["--config", f"{tmp_path}/c.yaml"])


def test_a_frame_is_bounded():
    assert ModelOptions(image_size=Size.read("16384")).image_size == (2**14, 2**14)
    with pytest.raises(ValueError, match="more than 16384"):
        Size.read("8x16385")


def test_lines_that_are_no_records_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [{"epoch": 1, "train": {}}, {"kind": "step", "epoch": 2, "step_of_epoch": 1}]
    noise = [b"5", b"[]", b"{}", b'{"epoch": "1"}', b'{"kind": "step", "epoch": 1}', b"\xff\xfe",
             b"[" * 100_000, b'{"epoch": null}', b'{"epoch": 1', b"9" * 5000]  # fmt: skip
    lines = [json.dumps(record).encode() for record in good]
    path.write_bytes(b"\n".join([noise[0], lines[0], *noise, lines[1], noise[-2]]))
    assert records.read_epochs(path) == good[:1]
    assert records.cut(path, epoch=2, steps=1) == good
    assert [json.loads(line) for line in path.read_text().splitlines()] == good


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": torch.zeros(2).to_sparse()}, "holds no plain numbers"),
        ({5: torch.zeros(2)}, "one of its names is 5"),
        ({"a\nb": torch.zeros(2)}, r"one of its names is 'a\\nb'"),
        ({"a\ud800": torch.zeros(2)}, "one of its names is"),
    ],
)
def test_tensors_that_are_no_plain_numbers(tmp_path, content, said):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=said):
        read_state_dict(tmp_path / "a.pth")


def test_a_checkpoint_that_holds_itself_is_no_endless_search(tmp_path):
    endless = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "a.pth")
    with pytest.raises(UserError, match="its entry 'model' is not a tensor"):
        read_state_dict(tmp_path / "a.pth")


def test_a_compressed_checkpoint_is_not_mapped_as_numbers(tmp_path):
    """torch would take the packed bytes for weights; and 1 MB can unpack to 1 GB."""
    plain = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    with pytest.raises(UserError, match="compressed zip"):
        read_state_dict(tmp_path / "a.pth")
