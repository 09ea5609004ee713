"""A model, a loss, a plan and data, as small as can be, with the interfaces of the real ones.

Imported by the tests of the engine and by the scripts that they start under torchrun.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from samtune.config import OptimOptions
from samtune.engine import distributed
from samtune.engine.checkpoint import Checkpoints
from samtune.engine.optim import build_optimizer, build_schedule
from samtune.engine.trainer import Trainer
from samtune.run_folder import RunFolder
from samtune.structures import Batch, Frame, Frames, Prediction, Prompts

SIZE = 8
METADATA = {"adapter": "tiny", "model_type": "toy", "image_size": SIZE, "base_sha256": "0" * 64}


class Head(nn.Module):
    """What SAM's mask decoder is here: a mask convolution, and an IoU head that no loss reads."""

    def __init__(self):
        super().__init__()
        self.mask = nn.Conv2d(4, 1, 1)
        self.iou_prediction_head = nn.Linear(4, 1)


class TinySegmenter(nn.Module):
    """The interface of PromptedSam: frozen encoder with a BatchNorm, an adapter, a decoder.

    trainable_norm: the adapter has a BatchNorm that trains. dropout draws random numbers in each
    step. aux: a further loss term.
    """

    def __init__(self, trainable_norm=False, dropout=0.0, aux=False, width=4):
        super().__init__()
        self.image_encoder = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.mask_decoder = Head()
        self.base_keys = frozenset(self.state_dict())
        norm = nn.BatchNorm2d(4) if trainable_norm else nn.Identity()
        self.requires_grad_(False)
        # A bias before a BatchNorm has no gradient but rounding errors, which Adam would blow up.
        convolution = nn.Conv2d(width, 4, 3, padding=1, bias=not trainable_norm)
        self.adapter = nn.Sequential(convolution, norm, nn.GELU())
        self.mask_decoder.mask.requires_grad_(True)
        self.dropout, self.aux = nn.Dropout(dropout), aux
        self.train()

    def forward(self, image, prompts, valid_size):
        features = self.image_encoder(image.float() / 255)
        features = self.dropout(self.adapter(features))
        logits = self.mask_decoder.mask(features)
        aux = {"size": features.square().mean()} if self.aux else None
        return Prediction(logits, aux=aux)

    def train(self, mode=True):
        super().train(mode)
        self.image_encoder.eval()
        return self


def new_model(**options) -> TinySegmenter:
    """The same random weights in every process."""
    torch.manual_seed(5)
    return TinySegmenter(**options)


def criterion(prediction, batch):
    bce = F.binary_cross_entropy_with_logits(
        prediction.logits.float()[:, 0], batch.target.float(), reduction="none"
    ).mean((1, 2))
    return 2 * bce, {"bce": bce}


def accuracy(prediction, batch):
    return {"iou": ((prediction.logits[:, 0] > 0) == batch.target).float().mean((1, 2))}


class Key(NamedTuple):
    epoch: int
    index: int
    weight: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What data/sampler.py's TrainPlan offers: each step's samples, dealt to the ranks."""

    samples: int
    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world: int = 1
    seed: int = 3

    @property
    def samples_per_step(self):
        return self.batch_size * self.accumulate * self.world

    @property
    def steps_per_epoch(self):
        return -(-self.samples // self.samples_per_step)

    def take(self, epoch, seen):
        order = torch.randperm(self.samples, generator=_generator(self.seed, epoch)).tolist()
        taken = order[seen:][: self.samples_per_step]
        mine = [Key(epoch, index) for index in taken[self.rank :: self.world]]
        if len(mine) < -(-len(taken) // self.world):
            mine.append(Key(epoch, taken[0], 0.0))
        size = self.batch_size
        return [mine[i : i + size] for i in range(0, len(mine), size)], len(taken)

    def step(self, epoch, step):
        return self.take(epoch, step * self.samples_per_step)

    def batches(self, epoch, seen):
        starts = range(seen, self.samples, self.samples_per_step)
        return [batch for start in starts for batch in self.take(epoch, start)[0]]


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(numbers) % 2**31)


class Items(Dataset):
    """Random pictures, another one per (epoch, index); the mask is where the picture is bright."""

    def __init__(self, samples, broken=()):
        self.samples, self.broken = samples, broken

    def __len__(self):
        return self.samples

    def __getitem__(self, key):
        generator = _generator(key.epoch, key.index)
        image = torch.randint(0, 256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        target = (image.float().mean(0) > 127).float()
        if key.index in self.broken:
            target[0, 0] = float("nan")
        return image, target, key


def collate(items) -> Batch:
    images, targets, keys = zip(*items, strict=True)
    frames = Frames.collate([Frame((SIZE, SIZE), (SIZE, SIZE)) for _ in keys], (SIZE, SIZE))
    return Batch(
        image=torch.stack(images),
        target=torch.stack(targets),
        prompts=Prompts(),
        frames=frames,
        weight=torch.tensor([key.weight for key in keys]),
        ids=[f"s{key.index}" for key in keys],
        paths=[f"images/s{key.index}.png" for key in keys],
    )


def make_batches(plan, workers=0, broken=()):
    """The loader factory that `Trainer.fit` wants."""
    data = Items(plan.samples, broken)
    return lambda epoch, seen: DataLoader(
        data, batch_sampler=plan.batches(epoch, seen), collate_fn=collate, num_workers=workers
    )


class Diary:
    """A logbook that remembers. `on_step` is called before each step of the training loop."""

    def __init__(self, on_step=None):
        self.records, self.said, self.on_step, self.steps = [], [], on_step, 0
        self.lines = []  # about steps

    def say(self, text):
        self.said.append(text)

    def progress(self, work, description, unit="batch"):
        for item in work:
            self.steps += 1
            if self.on_step:
                self.on_step(self.steps)
            yield item

    def epoch(self, record):
        kept = {k: v for k, v in record.items() if "seconds" not in k and k != "speed"}
        self.records.append(kept)

    def step(self, record):
        self.lines.append(record)


def new_trainer(model, process, plan, epochs=1, optim=None, **options) -> Trainer:
    optim = optim or OptimOptions(lr=0.05)
    model = distributed.wrap(model, process)
    optimizer = build_optimizer(model, optim)
    schedule = build_schedule(optimizer, optim, epochs * plan.steps_per_epoch)
    return Trainer(model, criterion, [accuracy], optimizer, schedule, process, **options)


def run_steps(trainer, plan, epochs=2) -> None:
    """All steps of some epochs, without anything around them."""
    trainer.model.train()
    for epoch in range(epochs):
        batches = iter(make_batches(plan)(epoch, 0))
        for step in range(plan.steps_per_epoch):
            micro_batches, count = plan.step(epoch, step)
            trainer.train_step([next(batches) for _ in micro_batches], count)
    trainer.check()


def scores_of(model, scores=None):
    """A validation: the given scores one after the other, or a sum that tells models apart."""
    scores = iter(scores or ())

    def validate():
        model.eval()
        total = sum(p.detach().double().sum() for p in model.parameters())
        return {"loss": next(scores, float(total)), "iou": 0.5}

    return validate


def fit(folder, process, plan, epochs, *, workers=0, on_step=None, resume=False, seed=1, **options):
    """A whole run on fresh objects; returns (trainer, diary, result)."""
    model = new_model(dropout=0.2)
    trainer = new_trainer(model, process, plan, epochs)
    torch.manual_seed(seed + process.rank)
    diary = Diary(on_step)
    folder = Checkpoints(RunFolder(folder), METADATA)
    state = folder.load_last() if resume else None
    broken = options.pop("broken", ())
    scores = options.pop("scores", None)
    options = {"patience": 0, "resume": state} | options
    try:
        result = trainer.fit(
            plan, make_batches(plan, workers, broken), scores_of(model, scores), diary, folder,
            epochs=epochs, **options,
        )  # fmt: skip
    except Exception as error:
        error.diary = diary
        raise
    return trainer, diary, result


def everything(trainer, diary) -> dict:
    """What must be equal, bit for bit, after two ways of reaching the same step."""
    return {
        "model": distributed.unwrap(trainer.model).state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "records": diary.records,
        "rng": torch.get_rng_state(),
    }


def same(a, b) -> bool:
    """Bitwise equality of nested dicts, lists, tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
