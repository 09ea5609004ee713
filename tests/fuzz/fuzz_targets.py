"""What is fuzzed: functions of bytes, and real files to begin with.

A target takes any bytes as one input of the program: a picture, a mask, a list, a tar, options, a
checkpoint. It returns if the program made something of them or refused them with a `UserError`;
whatever else it raises is a defect. `TARGETS` is shared by the property tests and by the
coverage-guided fuzzer (`run.py`), which change the bytes in `seeds`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save

from samtune import config, flags
from samtune.adapters import ADAPTERS
from samtune.config import ReadOptions, Size, read_batch_size, read_recompute
from samtune.data import limits
from samtune.data.arrays import ArraySlice, count_slices, read_slice
from samtune.data.coco import find_described, read_annotations
from samtune.data.codings import coding_of, parse_colours
from samtune.data.decoding import decode
from samtune.data.feature_cache import FeatureFiles, Form
from samtune.data.files import Affixes, natural, pair_up, select
from samtune.data.images import image_from, parse_range
from samtune.data.lists import listed_pairs
from samtune.data.masks import decode_mask, mask_from, numbers_from
from samtune.data.remote import refuse_secrets
from samtune.data.shards import named_shards, shard_pairs
from samtune.data.tar_files import index_tar, read_bytes
from samtune.engine import records
from samtune.engine.checkpoint import load_run_state
from samtune.errors import UserError
from samtune.gallery import file_below
from samtune.models import MODEL_TYPES
from samtune.structures import IGNORE
from samtune.tensor_files import read_state_dict
from samtune.trained import read_description

MASK_RULES = (
    ReadOptions(),
    ReadOptions(mask_threshold=100, foreground="below"),
    ReadOptions(num_classes=3, ignore_index=7),
    ReadOptions(num_classes=2, class_colours="0,0,0;255,0,0;ignore=1,2,3"),
    ReadOptions(mask_coding="red_below150"),
    ReadOptions(num_classes=19, mask_coding="cityscapes"),
    ReadOptions(num_classes=3, mask_coding="trans10k"),
    ReadOptions(num_classes=11, mask_coding="camvid_colour"),
    ReadOptions(num_classes=9, mask_coding="btcv"),
    ReadOptions(objects="instance"),
)
GROUPS = [
    {"model": config.ModelOptions, "read": ReadOptions, "data": config.TrainDataOptions,
     "test": config.TestDataOptions, "loader": config.LoaderOptions,
     "prompts": config.PromptOptions, "loss": config.LossOptions, "optim": config.OptimOptions,
     "run": config.RunOptions, "log": config.LogOptions,
     "adapter": ADAPTERS["lora"].options}[f.name]
    for f in fields(config.TrainConfig)
]  # fmt: skip
CHOICES = {"model_type": tuple(MODEL_TYPES), "adapter": tuple(ADAPTERS)}


@dataclass(frozen=True)
class Target:
    """run: takes the bytes. seeds: makes real inputs. repair: sets checksums right, or none."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    repair: Callable[[bytes], bytes] = bytes

    def __call__(self, data: bytes) -> None:
        with contextlib.suppress(UserError):
            self.run(self.repair(data))


@lru_cache
def folder() -> Path:
    """A folder for this process and those forked from it, in memory where the system has one."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    _KEPT.append(tempfile.TemporaryDirectory(prefix="fuzz-", dir=shared))
    return Path(_KEPT[0].name)


_KEPT: list[tempfile.TemporaryDirectory] = []  # removed with this process


@lru_cache
def pictures() -> Path:
    """A folder with images and masks that lists and annotations can name."""
    place = folder() / "pictures"
    place.mkdir()
    for name in ("a.png", "b.png", "a_mask.png", "b_mask.png"):
        (place / name).write_bytes(_encoded(_grey(), "PNG"))
    return place


def write(name: str, data: bytes) -> Path:
    path = folder() / name
    path.write_bytes(data)
    return path


# --- pictures and arrays ---


def image(data: bytes) -> None:
    path = write("picture.png", data)
    pixels = image_from(decode(path), MASK_RULES[0], path)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert 0 < pixels.shape[0] * pixels.shape[1] <= limits.MOST_PIXELS


def mask(data: bytes) -> None:
    """The first byte says which rule reads the rest."""
    read, path = (
        MASK_RULES[data[0] % len(MASK_RULES)] if data else MASK_RULES[0],
        folder() / "m.png",
    )
    path.write_bytes(data[1:])
    decoded = decode_mask(path, read)
    if read.objects == "instance":
        assert numbers_from(decoded, path).min() >= 0
        return
    ids, _ = mask_from(decoded, read, path)
    assert ids.dtype == np.uint8 and ids.shape == decoded.array.shape[:2]
    assert set(np.unique(ids)) <= {*range(max(2, read.num_classes)), IGNORE}


def arrays(data: bytes) -> None:
    """The first byte says what the rest is called."""
    name = ("a.npy", "a.npz", "a.h5")[data[0] % 3 if data else 0]
    path = write(name, data[1:])
    with contextlib.suppress(UserError):
        assert count_slices(path, "image") >= 0
    for address in (ArraySlice(path, "image", 0), ArraySlice(path, "image")):
        with contextlib.suppress(UserError):
            found = read_slice(address)
            assert found.ndim in (2, 3) and found.dtype.kind in "buif" and found.size


# --- what belongs together ---


def coco(data: bytes) -> None:
    annotations = folder() / f"{next(_COUNT)}.json"  # a file is read once per name
    annotations.write_bytes(data)
    try:
        for pair in find_described(pictures(), annotations, "--train_image_dir"):
            assert pair.image_path == pictures() / pair.id and ".." not in pair.id
            with contextlib.suppress(UserError):
                found = read_annotations(annotations, pair.id)
                assert all(mask.shape == found.unread.shape for mask in found.masks)
                assert len(found.names) == len(found.masks)
    finally:
        annotations.unlink()


_COUNT = iter(range(10**12))


def listed(data: bytes) -> None:
    """A pair is what one line says, and nothing else."""
    path = write("list.csv", data)
    pairs = listed_pairs(path, pictures(), pictures(), "--train_list")
    text = data.decode("utf-8-sig")
    for pair in pairs:
        assert pair.image_path.is_file() and pair.mask_path.is_file()
        names = [str(path.relative_to(pictures())) for path in (pair.image_path, pair.mask_path)]
        assert any(all(name in line for name in names) for line in text.splitlines()), names


def tar(data: bytes) -> None:
    path = write("0.tar", data)
    index = index_tar(str(path), {".png", ".jpg"})
    for member in index.members:
        assert len(read_bytes(member)) == member.size <= len(data)
        assert ".." not in member.member.split("/") and not member.member.startswith("/")
    for pair in shard_pairs([index], ReadOptions(), "--train_shards"):
        assert pair.image_path.stem.split(".")[0] == pair.mask_path.stem.split(".")[0]


def names(data: bytes) -> None:
    """Affixes and files between zero bytes: a pair shares its key, and each file is in one."""
    parts = data.decode("utf-8", "surrogateescape").split("\0")
    affixes, rest = parts[:4], [part for part in parts[4:] if part.strip("./ ")]
    of_image, of_mask = Affixes(*affixes[:2]), Affixes(*affixes[2:4])
    images, masks = ([Path("x") / (name.replace("/", "_") + ".png") for name in rest[side::2]]
                     for side in (0, 1))  # fmt: skip
    if not images:
        return
    pairs = pair_up(images, masks, of_image, of_mask, ("--train_image_dir", "--train_mask_dir"))
    assert sorted(pair.image_path for pair in pairs) == sorted(images)
    assert sorted(pair.mask_path for pair in pairs) == sorted(masks)
    for pair in pairs:
        assert pair.image_path.stem == of_image.prefix + pair.id + of_image.suffix
        assert pair.mask_path.stem == of_mask.prefix + pair.id + of_mask.suffix
        place = (folder() / file_below(pair.id, pair.id)).resolve()
        assert folder().resolve() in place.parents
    assert [pair.id for pair in pairs] == sorted((pair.id for pair in pairs), key=natural)


# --- options ---


def options(data: bytes) -> None:
    """A YAML file: what is understood reads back as it was."""
    path = write("c.yaml", data)
    flags.peek(["--config", str(path)], "adapter", "lora")
    said = flags.parse("run_sa.py", "", GROUPS, ["--config", str(path)], choices=CHOICES)
    path.write_text(yaml.safe_dump(flags.dump(said.instances), sort_keys=False))
    again = flags.parse("run_sa.py", "", GROUPS, ["--config", str(path)], choices=CHOICES)
    assert again.instances == said.instances


def texts(data: bytes) -> None:
    """The values of single flags; the first byte says which."""
    text = data[1:].decode("utf-8", "surrogateescape")
    readers = (Size.read, read_batch_size, read_recompute, parse_range, parse_colours, slices,
               shard_names, classes)  # fmt: skip
    with contextlib.suppress(ValueError):  # what flags turn into a UserError
        readers[data[0] % len(readers) if data else 0](text)


def slices(text: str) -> None:
    assert select([*range(10)], text, "--train_slice")


def shard_names(text: str) -> None:
    if not set(text) & set("*?[/"):  # no search on this disk
        refuse_secrets(text, "--train_shards")
        assert len(set(named_shards(text, "--train_shards"))) >= 1


def classes(text: str) -> None:
    number, _, rest = text.partition("\n")
    coding_of(ReadOptions(num_classes=int(number[:5]), class_colours=rest))


# --- checkpoints and what a run leaves ---


def safetensors(data: bytes) -> None:
    path = write("best.safetensors", data)
    for read in (read_state_dict, read_description):
        with contextlib.suppress(UserError):
            read(path)


def metadata(data: bytes) -> None:
    """The JSON beside the tensors."""
    content = save({"a": torch.zeros(1)}, {"samtune": data.decode("utf-8", "replace")})
    said = read_description(write("best.safetensors", content))
    assert said["adapter"] in ADAPTERS and said["model_type"] in MODEL_TYPES
    assert 1 <= said["config"].get("num_classes", 1) <= IGNORE


def pth(data: bytes) -> None:
    path = write("sam.pth", data)
    for read in (read_state_dict, load_run_state):
        with contextlib.suppress(UserError):
            read(path)


def metrics(data: bytes) -> None:
    path = write("metrics.jsonl", data)
    kept = records.cut(path, epoch=2, steps=3)
    assert records.cut(path, epoch=2, steps=3) == kept or "NaN" in path.read_text()
    assert len(records.read_epochs(path)) <= len(kept)


FORM = Form((2, 3, 3), torch.float32, torch.float32)


def features(data: bytes) -> None:
    files = FeatureFiles(folder(), "key", FORM)
    path = files.path("name")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    if (found := files.read("name")) is not None:
        assert tuple(found[0].shape) == FORM.shape and len(found[1]) == 2


# --- seeds ---


def _grey() -> np.ndarray:
    return np.repeat([[0, 255, 0, 255, 0]], 4, axis=0).astype(np.uint8)


def _encoded(array: np.ndarray, format: str, **more) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, **more)
    return file.getvalue()


def image_seeds() -> list[bytes]:
    import cv2

    colour = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    tags = Image.Exif()
    tags[0x0112] = 6
    files = [_encoded(colour, name) for name in
             ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM")]  # fmt: skip
    files += [_encoded(colour, "JPEG", exif=tags), _encoded(_grey() > 0, "PNG")]
    files += [_encoded(_grey(), "TIFF", compression="tiff_deflate")]
    files += [cv2.imencode(name, colour.astype(kind))[1].tobytes() for name, kind in
              ((".png", np.uint16), (".tif", np.float32))]  # fmt: skip
    with contextlib.suppress(OSError):
        files.append(_encoded(colour, "JPEG2000"))
    return files


def mask_seeds() -> list[bytes]:
    grey = _encoded(_grey(), "PNG")
    ids = _encoded(_grey() // 200 * 2, "PNG")
    red = np.zeros((4, 5, 3), np.uint8)
    red[..., 0] = _grey()
    palette = io.BytesIO()
    Image.fromarray(_grey() // 255).convert("P").save(palette, "PNG")
    files = [grey, ids, _encoded(red, "PNG"), palette.getvalue(), _encoded(_grey(), "JPEG")]
    return [bytes([rule]) + file for rule in range(len(MASK_RULES)) for file in files]


def array_seeds() -> list[bytes]:
    volume = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    npy, npz, h5 = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(npy, volume)
    np.savez(npz, image=volume[0], label=volume[1] > 3)
    with h5py.File(h5, "w") as file:
        file["image"] = volume
    return [bytes([kind]) + f.getvalue() for kind, f in enumerate((npy, npz, h5))]


def coco_seeds() -> list[bytes]:
    images = [{"id": i, "file_name": f"{n}.png", "height": 4, "width": 5} for i, n in
              enumerate("ab")]  # fmt: skip
    drawn = (
        [[0, 0, 4, 0, 4, 3]],
        {"size": [4, 5], "counts": [4, 4, 12]},
        {"size": [4, 5], "counts": "44<"},
    )
    annotations = [
        {"id": i, "image_id": i % 2, "category_id": 1, "iscrowd": i % 2, "segmentation": one}
        for i, one in enumerate(drawn)
    ]
    categories = [{"id": 1, "name": "../car"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return [json.dumps(content).encode()]


def list_seeds() -> list[bytes]:
    return [
        b"image,mask\na.png,a_mask.png\nb.png,b_mask.png\n",
        b"a.png a_mask.png\nb.png\tb_mask.png\n",
        b'"a.png","a_mask.png"\n./b.png,b_mask.png',
    ]


def tar_seeds() -> list[bytes]:
    files = []
    for format, name in ((tarfile.USTAR_FORMAT, "d/a"), (tarfile.PAX_FORMAT, "\xe4" * 60),
                         (tarfile.GNU_FORMAT, "long" * 40)):  # fmt: skip
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=format) as archive:
            for end in (".png", ".mask.png", ".txt"):
                member = tarfile.TarInfo(name + end)
                member.size = 5
                archive.addfile(member, io.BytesIO(b"01234"))
        files.append(file.getvalue())
    return files


def name_seeds() -> list[bytes]:
    return [b"\0\0\0\0a\0a\0b10\0b10", b"\0_rgb\0m_\0\0a_rgb\0m_a\0b_rgb\0m_b", b"\0\0\0\0a.b\0a.b"]


def option_seeds() -> list[bytes]:
    said = flags.parse("run_sa.py", "", GROUPS, []).instances
    return [
        yaml.safe_dump(flags.dump(said), sort_keys=False).encode(),
        b"lr: 1e-4\nimage_size: 360x480\nbatch_size: auto\nwandb: yes\ntrain_slice: '0:20'\n",
        b"project_name: 2024-01-01\ncrop: !!str 64\ntrain_list: ~\n",
    ]


def text_seeds() -> list[bytes]:
    said = (b"360x480", b"auto", b"2,5,8-11", b"-1.5,2e3", b"0,0,0;1,2,3;ignore=9,9,9", b"-5:",
            b"{a,b}-{00..11}.tar,c.tar", b"3\n0,0,0;1,1,1;2,2,2")  # fmt: skip
    return [bytes([kind]) + text for kind, text in enumerate(said)]


def description() -> dict:
    """What a run's file says about its model."""
    said = flags.dump(flags.parse("run_sa.py", "", GROUPS, ["--adapter", "lora"]).instances)
    return {
        "samtune": "0.1.0", "adapter": "lora", "model_type": "vit_mini", "image_size": 256,
        "base_file": "", "base_sha256": "", "epoch": 3, "config": said,
    }  # fmt: skip


def metadata_seeds() -> list[bytes]:
    return [json.dumps(description()).encode()]


def safetensors_seeds() -> list[bytes]:
    tensors = {"module.a": torch.ones(2, 3), "module.b": torch.zeros(1, dtype=torch.bfloat16)}
    return [save(tensors, {"samtune": json.dumps({"adapter": "lora"})}), save(tensors)]


def pth_seeds() -> list[bytes]:
    files = []
    for zipped in (True, False):
        file = io.BytesIO()
        state = {"model": {"a": torch.ones(2, 3), "b": torch.zeros(1)}, "step": 3}
        torch.save(state, file, _use_new_zipfile_serialization=zipped)
        files.append(file.getvalue())
    return files


def metrics_seeds() -> list[bytes]:
    lines = [
        {"epoch": 1, "train": {"loss": 0.5}},
        {"kind": "step", "epoch": 2, "step_of_epoch": 2},
        {"kind": "step", "epoch": 2, "step_of_epoch": 4},
        {"epoch": 2, "validation": {"loss": None}},
    ]
    return ["".join(json.dumps(line) + "\n" for line in lines).encode()]


def feature_seeds() -> list[bytes]:
    facts = {"name": "name", "order": "[1, 2, 0]", "picture_size": "[4, 5]"}
    return [save({"features": torch.zeros(3, 3, 2)}, facts)]


# --- checksums, which chance would never get right ---


def png_checksums(data: bytes) -> bytes:
    """The bytes with the right CRC behind each chunk, if they are a PNG."""
    start = data.find(b"\x89PNG\r\n\x1a\n")
    if start not in (0, 1):
        return data
    repaired, at = bytearray(data), start + 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if at + 12 + length > len(data):
            break
        crc = zlib.crc32(data[at + 4 : at + 8 + length])
        struct.pack_into(">I", repaired, at + 8 + length, crc)
        at += 12 + length
    return bytes(repaired)


def tar_checksums(data: bytes) -> bytes:
    """The bytes with the right sum in each block that looks like a header."""
    repaired = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        block = data[at : at + 512]
        if block[257:262] == b"ustar":
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            repaired[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(repaired)


TARGETS = {
    "image": Target(image, image_seeds, png_checksums),
    "mask": Target(mask, mask_seeds, png_checksums),
    "arrays": Target(arrays, array_seeds),
    "coco": Target(coco, coco_seeds),
    "list": Target(listed, list_seeds),
    "tar": Target(tar, tar_seeds, tar_checksums),
    "names": Target(names, name_seeds),
    "options": Target(options, option_seeds),
    "texts": Target(texts, text_seeds),
    "safetensors": Target(safetensors, safetensors_seeds),
    "metadata": Target(metadata, metadata_seeds),
    "pth": Target(pth, pth_seeds),
    "metrics": Target(metrics, metrics_seeds),
    "features": Target(features, feature_seeds),
}
