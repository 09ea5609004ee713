"""What is fuzzed: functions of bytes.

A target takes any bytes as one input of the program: a picture, a mask, a list, a tar, options, a
checkpoint. It returns if the program made something of them or refused them with a `UserError`;
whatever else it raises is a defect. `TARGETS` is shared by the property tests and by the
coverage-guided fuzzer (`fuzz_longer.py`), which change the bytes of real files (`fuzz_seeds`).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import fuzz_seeds as seeds
import numpy as np
import torch
import yaml
from fuzz_seeds import CHOICES, FEW_GROUPS, MASK_RULES
from safetensors.torch import save

from samtune import flags
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
        (place / name).write_bytes(seeds.encoded(seeds.grey(), "PNG"))
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
    said = flags.parse("run_sa.py", "", FEW_GROUPS, ["--config", str(path)], choices=CHOICES)
    path.write_text(yaml.safe_dump(flags.dump(said.instances), sort_keys=False))
    again = flags.parse("run_sa.py", "", FEW_GROUPS, ["--config", str(path)], choices=CHOICES)
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


TARGETS = {
    "image": Target(image, seeds.image_seeds, seeds.png_checksums),
    "mask": Target(mask, seeds.mask_seeds, seeds.png_checksums),
    "arrays": Target(arrays, seeds.array_seeds),
    "coco": Target(coco, seeds.coco_seeds),
    "list": Target(listed, seeds.list_seeds),
    "tar": Target(tar, seeds.tar_seeds, seeds.tar_checksums),
    "names": Target(names, seeds.name_seeds),
    "options": Target(options, seeds.option_seeds),
    "texts": Target(texts, seeds.text_seeds),
    "safetensors": Target(safetensors, seeds.safetensors_seeds),
    "metadata": Target(metadata, seeds.metadata_seeds),
    "pth": Target(pth, seeds.pth_seeds),
    "metrics": Target(metrics, seeds.metrics_seeds),
    "features": Target(features, seeds.feature_seeds),
}
