"""What fuzzing begins with: small real files of each kind that the program reads."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tarfile
import zlib
from dataclasses import fields

import h5py
import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save

from samtune import config, flags
from samtune.adapters import ADAPTERS
from samtune.config import ReadOptions
from samtune.models import MODEL_TYPES

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
FEW_GROUPS = [config.ModelOptions, config.LoaderOptions, config.LogOptions]  # quick to read
CHOICES = {"model_type": tuple(MODEL_TYPES), "adapter": tuple(ADAPTERS)}


def grey() -> np.ndarray:
    return np.repeat([[0, 255, 0, 255, 0]], 4, axis=0).astype(np.uint8)


def encoded(array: np.ndarray, format: str, **more) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, **more)
    return file.getvalue()


def image_seeds() -> list[bytes]:
    import cv2

    colour = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    tags = Image.Exif()
    tags[0x0112] = 6
    files = [encoded(colour, name) for name in
             ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM")]  # fmt: skip
    files += [encoded(colour, "JPEG", exif=tags), encoded(grey() > 0, "PNG")]
    files += [encoded(grey(), "TIFF", compression="tiff_deflate")]
    files += [cv2.imencode(name, colour.astype(kind))[1].tobytes() for name, kind in
              ((".png", np.uint16), (".tif", np.float32))]  # fmt: skip
    with contextlib.suppress(OSError):
        files.append(encoded(colour, "JPEG2000"))
    return files


def mask_seeds() -> list[bytes]:
    plain = encoded(grey(), "PNG")
    ids = encoded(grey() // 200 * 2, "PNG")
    red = np.zeros((4, 5, 3), np.uint8)
    red[..., 0] = grey()
    palette = io.BytesIO()
    Image.fromarray(grey() // 255).convert("P").save(palette, "PNG")
    files = [plain, ids, encoded(red, "PNG"), palette.getvalue(), encoded(grey(), "JPEG")]
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
    said = flags.parse("run_sa.py", "", FEW_GROUPS, []).instances
    return [
        yaml.safe_dump(flags.dump(said), sort_keys=False).encode(),
        b"image_size: 360x480\nbatch_size: auto\nwandb: yes\nadapter: 'lora'\n",
        b"project_name: 2024-01-01\nlog_every: !!str 64\ncheckpoint: ~\n",
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
