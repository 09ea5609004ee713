"""Features that training cannot change: computed once by all processes, read in every epoch.

Composes the model's frozen part, the dataset's views and the files on disk.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from samtune.config import LoaderOptions, ModelOptions, Size, TrainDataOptions
from samtune.data.datasets import SegmentationDataset
from samtune.data.feature_cache import FeatureFiles, Form, KeptViews, digest, make_room
from samtune.data.loading import make_loader
from samtune.engine import distributed
from samtune.engine.distributed import Process
from samtune.engine.logbook import Logbook
from samtune.engine.optim import autocast
from samtune.errors import UserError
from samtune.models.prefix import fingerprint, frozen_stages, reads_image, stages_of
from samtune.models.segmenter import PromptedSam

_VERSION = 1  # raise it when the same files and weights come to mean other features
_WORTH_KEEPING = 2  # stages: the patches alone are larger than the picture and cost nothing
_NUMBERS = {"fp32": None, "bf16": torch.bfloat16}  # None: as the model gives them


def check_caching(data: TrainDataOptions, model_options: ModelOptions, model: PromptedSam) -> None:
    """Raises UserError where features cannot be kept, or are not the same in any two epochs."""
    if data.augment_views < 0:
        raise UserError(f"--augment_views {data.augment_views}: it must be 0 or more")
    if data.cache_features == "none":
        return
    flag = f"--cache_features {data.cache_features}"
    if (data.augment != "none" or data.crop) and not data.augment_views:
        raise UserError(
            f"{flag}: no picture comes again while each epoch augments anew: set --augment_views 4 "
            "(four variants of each image, which repeat), or --augment none"
        )
    if frozen_stages(model.image_encoder) < _WORTH_KEEPING:
        raise UserError(
            f"{flag}: with --adapter {model_options.adapter} and --train {model_options.train} "
            "training reaches the beginning of the image encoder, so nothing stays the same; drop "
            "it, let --adapter_blocks begin late, or take --adapter decoder --train adapter"
        )


class Pictures(NamedTuple):
    """Views to encode. image: (B, 3, S_h, S_w) uint8. valid_size: (B, 2). sizes: (H, W) of each
    picture's file. names: of the files to write."""

    image: Tensor
    valid_size: Tensor
    sizes: list[tuple[int, int]]
    names: list[str]


class _Missing(torch.utils.data.Dataset):
    """Views of a dataset as it reads them for training, without what is asked about them."""

    def __init__(self, dataset: SegmentationDataset):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        epoch, index = key
        name = self.dataset.kept.name(self.dataset.view_of(epoch), index)
        return self.dataset.look(epoch, index), name

    def files_of(self, keys: Sequence[tuple[int, int]]) -> list[str]:
        return [str(self.dataset.pairs[index].image_path) for _, index in keys]


def _collate(items: Sequence[tuple]) -> Pictures:
    views, names = zip(*items, strict=True)
    image = torch.stack([torch.from_numpy(view.image) for view in views])  # (B, S_h, S_w, 3)
    return Pictures(
        image.permute(0, 3, 1, 2).contiguous(),
        torch.tensor([view.frame.valid_size for view in views]),
        [view.picture_size for view in views],
        list(names),
    )


class FeatureCaching:
    """Keeps what the frozen part of `model` says of the views of datasets.

    model: on its device, not wrapped; `check_caching` has passed. epochs: of the run.
    """

    def __init__(
        self,
        options: TrainDataOptions,
        model: PromptedSam,
        precision: str,
        loader: LoaderOptions,
        epochs: int,
        process: Process,
        logbook: Logbook,
    ):
        self.options, self.model, self.precision = options, model, precision
        self.loader, self.epochs, self.process, self.logbook = loader, epochs, process, logbook
        self.folder = Path(options.cache_dir)
        self.form = self._form(options.crop or model.image_size)
        self.kept: dict[str, SegmentationDataset] = {}
        self._filled: set[tuple[str, int]] = set()

    def keep(self, name: str, dataset: SegmentationDataset) -> SegmentationDataset:
        """Collective. A dataset that reads features where they are kept. name: for people."""
        drawn = dataset.drawn
        digests = self._digests(name, dataset, with_mask=bool(drawn))
        files = FeatureFiles(self.folder, self._key(dataset), self.form)
        needs_image = reads_image(self.model.image_encoder)
        self.kept[name] = dataset.keeping(KeptViews(files, digests, drawn, needs_image))
        return self.kept[name]

    @torch.no_grad()
    def _form(self, frame: Size) -> Form:
        """What one picture's features look like, from a black one."""
        image = torch.zeros(1, 3, *frame, dtype=torch.uint8, device=self.process.device)
        given = self._encode(image, torch.tensor([tuple(frame)]))
        stored = _NUMBERS[self.options.cache_features] or given.dtype
        return Form(tuple(given.shape[1:]), stored, given.dtype)

    def _encode(self, image: Tensor, valid_size: Tensor) -> Tensor:
        device = self.process.device
        with autocast(self.precision, device):
            return self.model.frozen(
                image.to(device, non_blocking=True), valid_size.to(device, non_blocking=True)
            ).cpu()

    def _key(self, dataset: SegmentationDataset) -> str:
        """All that features follow from beside the picture and its view."""
        model, read = self.model, dataset.read
        facts = [
            _VERSION, fingerprint(model.image_encoder),
            model.pixel_mean.flatten().tolist(), model.pixel_std.flatten().tolist(),
            list(dataset.crop or dataset.image_size), read.resize, read.intensity_range,
            self.precision, self.process.device.type, torch.get_float32_matmul_precision(),
            torch.__version__, str(self.form.stored), str(self.form.given),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _digests(self, name: str, dataset: SegmentationDataset, with_mask: bool) -> list[str]:
        """Collective. Each pair's content; every rank reads its share."""
        rank, world = self.process.rank, self.process.world
        mine = []
        with distributed.together():
            pairs = dataset.pairs[rank::world]
            for pair in self.logbook.progress(pairs, f"{name}: content of files", "file"):
                mine.append(digest(pair, with_mask))
        digests = [""] * len(dataset)
        for start, share in enumerate(distributed.all_gather_objects(mine)):
            digests[start::world] = share
        return digests

    def make_room(self) -> None:
        """Collective. Say what is kept where; raises UserError if it does not fit."""
        wanted = {
            dataset.kept.name(view, index): dataset.kept.files
            for dataset in self.kept.values()
            for view in range(self._views(dataset))
            for index in range(len(dataset))
        }
        with distributed.together():
            if self.process.is_main:
                self._make_room(wanted)
        self._check_shared()

    def _views(self, dataset: SegmentationDataset) -> int:
        """How many views of each picture the run sees."""
        return min(self.options.augment_views, self.epochs) if dataset.drawn else 1

    def _make_room(self, wanted: dict[str, FeatureFiles]) -> None:
        missing = [name for name, files in wanted.items() if not files.holds(name)]
        paths = [files.path(name) for name, files in wanted.items()]
        limit, size = int(self.options.cache_limit * 1e9), self.form.file_bytes
        advice = "raise --cache_limit, lower --augment_views, or take --cache_features bf16"
        removed = make_room(self.folder, paths, len(missing) * size, limit, advice)
        encoder = self.model.image_encoder
        frozen, stages = frozen_stages(encoder), len(stages_of(encoder))
        self.logbook.say(
            f"features: {frozen} of {stages} stages of the image encoder never change; "
            f"{len(wanted)} files of {size / 1e6:.2f} MB in {self.folder}, {len(missing)} of them "
            "to be computed" + (f"; {removed} files of other runs removed" if removed else "")
        )

    def _check_shared(self) -> None:
        """Collective. Whether all processes see one folder."""
        token = self.folder / f".shared.{distributed.broadcast_object(time.time_ns())}"
        with distributed.together():
            if self.process.is_main:
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    token.touch()
                except OSError as error:
                    raise UserError(f"--cache_dir {self.folder}: {error.strerror}") from None
        with distributed.together():
            if not token.exists():
                raise UserError(
                    f"--cache_dir {self.folder} is another folder on each machine: choose one on "
                    "a disk that all of them share"
                )
        if self.process.is_main:
            token.unlink(missing_ok=True)

    def fill(self, epoch: int) -> Iterator[None]:
        """Collective. Compute what is missing of an epoch's views; gives way after each batch, on
        all ranks equally often. What is done is kept if the caller stops here.
        """
        for name, dataset in self.kept.items():
            view = dataset.view_of(epoch) if dataset.drawn else 0
            if (name, view) in self._filled:
                continue
            yield from self._fill(name, dataset, epoch if dataset.drawn else 0)
            self._filled.add((name, view))

    def _fill(self, name: str, dataset: SegmentationDataset, epoch: int) -> Iterator[None]:
        missing = self._missing(dataset, epoch)
        if not missing:
            return
        rank, world, size = self.process.rank, self.process.world, self.loader.batch_size
        mine = [(epoch, index) for index in missing[rank::world]]
        batches = [mine[i : i + size] for i in range(0, len(mine), size)]
        error, started = None, time.monotonic()
        with torch.random.fork_rng(devices=[]):  # a loader may draw; training must not notice
            loader = make_loader(
                _Missing(dataset), batches, self.loader.workers,
                self.process.device.type == "cuda", collate=_collate,
            )  # fmt: skip
            views = iter(loader)
        rounds = range(-(-len(missing) // (world * size)))
        with loader:
            for _ in self.logbook.progress(rounds, f"features of {name} images"):
                try:
                    if error is None and (pictures := next(views, None)) is not None:
                        self._write(dataset.kept.files, pictures)
                except UserError as raised:  # the others are told when all are here
                    error = raised
                yield
        distributed.agree(error)
        self.logbook.say(
            f"features of {len(missing)} {name} images: {time.monotonic() - started:.1f} s"
        )

    def _missing(self, dataset: SegmentationDataset, epoch: int) -> list[int]:
        """Collective. One index of each file that is not there, the same list on every rank."""
        rank, world, kept = self.process.rank, self.process.world, dataset.kept
        view = dataset.view_of(epoch)
        mine = {}
        for index in range(rank, len(dataset), world):
            name = kept.name(view, index)
            if not kept.files.holds(name):
                mine[name] = index
        found: dict[str, int] = {}
        for share in distributed.all_gather_objects(mine):
            found |= share
        return sorted(found.values())

    def _write(self, files: FeatureFiles, pictures: Pictures) -> None:
        """Encode and keep them, in a batch of full size: how sums are rounded may depend on it, and
        so a picture's features do not depend on which others were missing.
        """
        rows = torch.arange(self.loader.batch_size).clamp(max=len(pictures.names) - 1)
        features = self._encode(pictures.image[rows], pictures.valid_size[rows])
        for one, size, name in zip(features, pictures.sizes, pictures.names, strict=False):
            files.write(name, one, size)
