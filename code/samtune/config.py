"""What a user can set: every flag of every verb, its default, its unit and its meaning.

Plain data, no torch: `--help` reads this file only. A field is a flag of the same name, a key of
`--config FILE.yaml`, and a key of the `config.yaml` in a run's folder. An adapter's own flags stand
beside the adapters (`adapters/options.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NewType

MOST_SIDE = 2**14  # pixels of a model's frame


class Size(NamedTuple):
    """(height, width) in pixels; 0 x 0 is one that nobody has said, and false."""

    height: int
    width: int

    @classmethod
    def read(cls, value: int | str | Sequence[int]) -> Size:
        """A number is the side of a square, text is `512` or `360x480`, empty text is 0.

        Raises ValueError for other text, and for more than `MOST_SIDE`.
        """
        if isinstance(value, str):
            match = re.fullmatch(r"([0-9]{1,9})(?:x([0-9]{1,9}))?", value or "0")
            if not match:
                raise ValueError(f"expected a number or HEIGHTxWIDTH in pixels, got {value[:80]!r}")
            if max(int(match[1]), int(match[2] or 0)) > MOST_SIDE:
                raise ValueError(f"more than {MOST_SIDE} pixels a side: {value}")
            return cls(int(match[1]), int(match[2] or match[1]))
        return cls(value, value) if isinstance(value, int) else cls(*value)

    @property
    def plain(self) -> int | str:
        """For files: the number for a square, as it always was, else `360x480`."""
        return self.height if self.height == self.width else f"{self.height}x{self.width}"

    def __bool__(self) -> bool:
        return any(self)

    def __repr__(self) -> str:
        return str(self.plain)


BatchSize = NewType("BatchSize", object)  # images, or 'auto'; flags read it by `read_batch_size`
Recompute = NewType("Recompute", str)  # which blocks; flags read it by `read_recompute`


def read_batch_size(value: int | str) -> int | str:
    """A whole number as it is or as text, or 'auto'. Raises ValueError for other text."""
    if value == "auto":
        return value
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"expected a whole number or auto, got {value!r}") from None


def read_recompute(value: bool | str) -> str:
    """'no', 'yes', 'global' or blocks like '2,5,8-11'; what files say of a switch is taken too.

    Raises ValueError for other text.
    """
    word = str(value).lower()
    word = {"true": "yes", "on": "yes", "false": "no", "off": "no"}.get(word, word)
    if not re.fullmatch(r"yes|no|global|\d+(-\d+)?(,\d+(-\d+)?)*", word):
        raise ValueError(f"expected no, yes, global or blocks like 2,5,8-11, got {value!r}")
    return word


# What a model can be told. 'mixed' is one of the others, drawn for each question in training.
PROMPTS = ("box", "point", "points", "box+points", "mask", "whole_image", "mixed", "none")


def option(default, help: str, choices: tuple | None = None, alone: str | None = None):
    """A dataclass field that is a flag: its default, its help, the values it may take, and the one
    that it has where it stands alone (a switch that stands alone means yes anyhow).
    """
    return field(default=default, metadata={"help": help, "choices": choices, "alone": alone})


@dataclass(frozen=True)
class ModelOptions:
    """Model"""

    model_type: str = option("vit_mini", "size of SAM; vit_mini is a small one for a first try")
    checkpoint: str = option(
        "auto",
        "file with SAM's weights; 'auto': the official file in checkpoints/ (vit_mini has none and "
        "starts from random weights); 'none': start from random weights",
    )
    download: bool = option(False, "fetch a missing official checkpoint from its official address")
    adapter: str = option("sam_adapter", "how SAM is adapted")
    train: str = option(
        "auto",
        "what trains: 'adapter': what the adapter says; 'prompt_encoder': that and what --prompt "
        "reads of the prompt encoder; 'all': that, image encoder and mask decoder too; 'auto': "
        "'all' from random weights, else 'adapter'",
        ("auto", "adapter", "prompt_encoder", "all"),
    )
    image_size: Size = option(
        Size(0, 0),
        "what the model sees, pixels: the side of a square or HEIGHTxWIDTH, multiples of 16 "
        "(samus: of 8; gsam: any from 16 on); 0: the adapter's own if it has one, else the model's",
    )
    class_layout: str = option(
        "samed",
        "with --num_classes and --prompt none, how the mask decoder holds the classes: 'samed': a "
        "token for each; 'gsam': as files of G-SAM hold them",
        ("samed", "gsam"),
    )
    normalisation: str = option(
        "sam",
        "how the weights want pixels: 'sam': SAM's mean and deviation (MobileSAM's and micro-sam's "
        "weights too); 'unit': 0..1 (MedSAM's); 'gsam': those of published GSAM weights",
        ("sam", "unit", "gsam"),
    )

    def __post_init__(self):
        object.__setattr__(self, "image_size", Size.read(self.image_size))


@dataclass(frozen=True)
class NameOptions:
    """How image and mask files are named"""

    image_prefix: str = option("", "start of image file names that is not part of the pairing key")
    image_suffix: str = option("", "end of image file names (before the extension) likewise")
    mask_prefix: str = option("", "start of mask file names that is not part of the pairing key")
    mask_suffix: str = option("", "end of mask file names (before the extension) likewise")


@dataclass(frozen=True)
class ReadOptions(NameOptions):
    """How image and mask files are read"""

    mask_coding: str = option(
        "auto",
        "how mask values are read: 'auto': one object (0 and 1, 0 and 255, --mask_threshold), or "
        "with --num_classes the ids themselves; the others are fixed rules of known data sets: a "
        "cut of grey or red values, or a table of ids or colours",
        (
            "auto", "above128", "above200", "red_above150", "red_below150", "cityscapes",
            "trans10k", "camvid_colour", "btcv",
        ),
    )  # fmt: skip
    class_colours: str = option(
        "",
        "colours of masks that are drawn in colour, 'R,G,B;R,G,B;...', one per class id from 0 on; "
        "with 'ignore=' before it a colour is left out of losses and scores",
    )
    class_names: str = option("", "with --num_classes: names of the ids, with commas between")
    mask_threshold: int = option(
        -1, "mask values of at least this are one side, the others the other; -1: decide by file"
    )
    foreground: str = option(
        "above", "which side of the threshold is the object", ("above", "below")
    )
    num_classes: int = option(
        1,
        "1: masks show one kind of object; K of 2 or more: their values are class ids 0..K-1, the "
        "background being one of them if there is one",
    )
    ignore_index: int = option(
        255, "with --num_classes: the mask value of pixels that no loss and no score reads"
    )
    objects: str = option(
        "auto",
        "what a question is about, under a prompt: 'mask': all that a mask shows; 'class': each "
        "class in the image; 'component': each connected part (of each class); 'instance': each "
        "value but 0 of masks that number their objects, or each annotation of a COCO .json given "
        "as mask folder; 'auto': 'class' with --num_classes of 2 or more and a prompt, else 'mask'",
        ("auto", "mask", "class", "component", "instance"),
    )
    background: int = option(
        0, "with --num_classes: the class that no question is about; -1: ask about every class"
    )
    ask_classes: str = option(
        "",
        "with --num_classes: names or ids of the only classes that questions are about, with "
        "commas between; empty: all but --background",
    )
    min_area: int = option(1, "components and instances of fewer pixels are not asked about")
    intensity_range: str = option(
        "auto",
        "LOW,HIGH: values of 16-bit or float images that become 0 and 255; 'auto': the 0.5 and "
        "99.5 percentile of each image",
    )
    resize: str = option(
        "pad",
        "how an image is fitted: 'pad' keeps its aspect, 'squash' does not",
        ("pad", "squash"),
    )


@dataclass(frozen=True)
class TrainDataOptions:
    """Training and validation data"""

    train_image_dir: str = option("", "training images; empty: a small sample set is made and used")
    train_mask_dir: str = option("", "their masks")
    val_image_dir: str = option("", "validation images; empty: those of --train_image_dir")
    val_mask_dir: str = option("", "their masks; empty: those of --train_mask_dir")
    train_slice: str = option(
        "", "START:STOP of the training pairs in sorted order, as in Python; empty: all"
    )
    val_slice: str = option("", "the same for validation")
    train_list: str = option(
        "",
        "file with an image and its mask per line (comma, tab or space between), relative to "
        "--train_image_dir and --train_mask_dir, or where those are empty to the file's folder",
    )
    val_list: str = option("", "the same for validation")
    train_shards: str = option(
        "",
        "tar files instead of folders, as webdataset writes them (KEY.jpg beside KEY.mask.png or "
        "KEY.seg.png): 'data/train-{000..009}.tar', 'a.tar,b.tar', 'data/*.tar' or any URL that "
        "fsspec opens",
    )
    val_shards: str = option("", "the same for validation")
    dataset: str = option(
        "",
        "a named data set instead of folders, or several joined by '+': camvid, camvid_colour, "
        "massachusetts, isbi2012, kvasir, synapse, cityscapes, trans10k, cod10k, camo, chameleon, "
        "nc4k, istd, duts, ecssd, dut_omron, hku_is, pascal_s",
    )
    data_root: str = option("", "folder that holds it, as it was unpacked")
    val_share: float = option(
        0.1,
        "where a named data set has no validation split: the part of its training images, in whole "
        "groups (sequence, volume, scene), that is held out for it",
    )
    augment: str = option(
        "standard",
        "'standard': half of the images flipped, turned by 90 degrees or shifted, scaled and "
        "rotated; 'flip': half of them flipped left-right; 'rotate': all rotated by up to 90 "
        "degrees, and half of them flipped left-right; 'none'",
        ("standard", "flip", "rotate", "none"),
    )
    augment_views: int = option(
        0, "augmentations of an image that repeat from then on; 0: new ones in every epoch"
    )
    crop: Size = option(
        Size(0, 0),
        "train on random windows of the frame of this size, as image_size is said; validation and "
        "test see whole frames (gsam only); 0: on whole frames",
    )
    cache_features: str = option(
        "none",
        "keep on disk what training cannot change of the image encoder, computed once per image "
        "and view: 'fp32': as it is, so losses stay the same; 'bf16': rounded, half the size; with "
        "augmentation it takes --augment_views",
        ("none", "fp32", "bf16"),
    )
    cache_dir: str = option(
        "cache", "where it is kept, for all runs; on several machines a folder that all see"
    )
    cache_limit: float = option(
        50.0, "GB that --cache_dir may hold; what was used longest ago goes first"
    )

    def __post_init__(self):
        object.__setattr__(self, "crop", Size.read(self.crop))

    @property
    def named(self) -> bool:
        """Whether there is anything to train on but the sample set."""
        return bool(self.train_image_dir or self.train_list or self.train_shards or self.dataset)


@dataclass(frozen=True)
class TestDataOptions:
    """Test data"""

    test_image_dir: str = option("", "test images")
    test_mask_dir: str = option("", "their masks")
    test_slice: str = option("", "START:STOP of the test pairs in sorted order; empty: all")
    test_list: str = option("", "file with an image and its mask per line, as --train_list")
    test_shards: str = option("", "tar files instead of folders, as --train_shards")
    test_datasets: str = option(
        "",
        "named data sets with commas between, each scored apart; empty: no folders, list or "
        "shards either, the test split of --dataset",
    )
    test_data_root: str = option("", "folder that holds them; empty: that of --data_root")

    @property
    def named(self) -> bool:
        """Whether there is anything to score."""
        return bool(self.test_image_dir or self.test_list or self.test_shards or self.test_datasets)


@dataclass(frozen=True)
class LoaderOptions:
    """Loading"""

    batch_size: BatchSize = option(
        1,
        "images per process and forward pass; 'auto', in training: as many as fit into memory with "
        "these options, found by trial before the run and written into its config.yaml",
    )
    workers: int = option(
        -1,
        "loader processes per training process, and in scoring as many threads that measure; -1: "
        "up to 4, as cores allow",
    )
    decode_rows: int = option(
        64,
        "questions per call of the mask decoder in validation and scoring, where images may hold "
        "many objects: bounds memory, changes no score; 0: all of a batch",
    )


@dataclass(frozen=True)
class PromptOptions:
    """Prompts"""

    prompt: str = option(
        "box",
        "what the model is told: 'box': the box of the true mask; 'point': a random pixel of it "
        "(in scoring its innermost one); 'points': --num_points of them, half inside and half "
        "outside; 'box+points'; 'mask': a rough copy of it; 'whole_image': a box around "
        "everything; 'mixed': in training one of box, point, points, box+points and mask for each "
        "question, in scoring the box; 'none'",
        PROMPTS,
    )
    num_points: int = option(2, "points of a question; every other one lies outside of the object")
    refine_steps: int = option(
        0,
        "clicks that correct the answer, as SAM was trained: each on a wrong pixel (in scoring in "
        "the middle of the largest error), with the last answer as mask prompt; the loss is the "
        "mean over all answers",
    )
    max_objects: int = option(
        32, "questions about an image in training, drawn anew in each epoch if it has more; 0: all"
    )
    box_scale: float = option(1.0, "factor on the box's sides, about its centre")
    box_jitter: float = option(
        0.0, "shift of each box side in training, uniform up to this fraction of the box's side"
    )
    scoring_jitter: float = option(0.0, "the same in validation and scoring, drawn once per object")
    empty_masks: str = option(
        "skip",
        "images without object under a prompt: 'skip' them (counted in the log), or prompt with "
        "the box of the 'whole' image, points outside, or an empty mask (with --objects mask)",
        ("skip", "whole"),
    )


@dataclass(frozen=True)
class LossOptions:
    """Loss"""

    bce_weight: float = option(1.0, "one mask per row: weight of the binary cross-entropy")
    iou_weight: float = option(1.0, "one mask per row: weight of the soft IoU loss")
    bce: str = option(
        "plain",
        "one mask per row: 'plain': all pixels count alike in its binary cross-entropy; "
        "'balanced': object and background do, as published for shadows",
        ("plain", "balanced"),
    )
    ce_weight: float = option(1.0, "a mask per class: weight of the cross-entropy")
    dice_weight: float = option(0.0, "a mask per class: weight of the soft Dice loss")
    class_weights: str = option(
        "", "a mask per class: what the cross-entropy of each class counts, with commas between"
    )
    loss_resolution: str = option(
        "original",
        "where the loss is taken: at each image's 'original' size or in the model's 'frame'",
        ("original", "frame"),
    )


@dataclass(frozen=True)
class OptimOptions:
    """Optimisation"""

    lr: float = option(2e-4, "peak learning rate of AdamW")
    min_lr: float = option(0.0, "learning rate at the end of the cosine")
    warmup_steps: int = option(0, "optimizer steps of linear warm-up")
    weight_decay: float = option(0.01, "on weights of linear and convolution layers only")
    clip_norm: float = option(0.0, "largest norm of the gradient; 0: no clipping")
    accumulate: int = option(1, "forward passes per optimizer step")
    activation_checkpointing: Recompute = option(
        "no",
        "compute blocks of the image encoder again in the backward pass instead of keeping their "
        "activations, the same numbers with less memory in more time: 'yes': all blocks, about a "
        "third more time; 'global': those of global attention; or a list like '2,5,8-11'; 'no'",
        alone="yes",
    )
    shard: bool = option(
        False,
        "with several processes: each keeps a part of the parameters, gradients and optimizer "
        "state instead of all (FSDP2), for sizes that do not fit on one GPU; the same numbers",
    )
    precision: str = option(
        "auto",
        "'auto': bf16 where the GPU has it, else fp16 on a GPU, fp32 on a CPU",
        ("auto", "fp32", "bf16", "fp16"),
    )
    tf32: bool = option(
        False,
        "on a GPU, let what is computed in float32 multiply in TF32: faster, 10 bits of mantissa",
    )
    compile: bool = option(
        False,
        "compile the image encoder's blocks (torch.compile), for faster steps after a slow first "
        "one; the same numbers up to rounding; a CPU needs a C++ compiler",
    )

    def __post_init__(self):
        blocks = read_recompute(self.activation_checkpointing)
        object.__setattr__(self, "activation_checkpointing", blocks)


@dataclass(frozen=True)
class RunOptions:
    """Run"""

    epoch: int = option(10, "passes over the training images")
    seed: int = option(21, "of weights, data order and augmentation")
    deterministic: bool = option(False, "bitwise repeatable on a GPU too, at some cost in time")
    best_by: str = option(
        "loss",
        "validation score that says which epoch is best; mIoU: of a model with a mask per class",
        ("loss", "iou", "dice", "mIoU"),
    )
    patience: int = option(
        -1, "epochs without improvement before stopping; -1: half of --epoch; 0: never stop"
    )
    output_dir: str = option("", "the run's folder; empty: a new one under checkpoints/")
    resume: str = option(
        "",
        "go on with the run in this folder; 'auto': with --output_dir, or without one with the "
        "newest run in checkpoints/, or begin anew where there is none",
    )
    save_pth: bool = option(False, "also write best.pth, a flat dict of tensors by name")
    timeout: int = option(60, "minutes that a process waits for the others before it gives up")


@dataclass(frozen=True)
class LogOptions:
    """Logging"""

    log_every: int = option(
        50,
        "optimizer steps of an epoch between two lines of losses, gradient norm, speed and memory; "
        "0: none",
    )
    wandb: bool = option(False, "log to Weights & Biases too")
    wandb_mode: str = option(
        "auto",
        "'auto': online if a key is there, else offline",
        ("auto", "online", "offline"),
    )
    project_name: str = option("samtune", "Weights & Biases project")


@dataclass(frozen=True)
class EvaluateOptions:
    """What is scored"""

    run_dir: str = option("", "the run's folder, or its file; empty: the newest in checkpoints/")
    checkpoint: str = option("", "SAM's weights, if they moved since training")
    output_dir: str = option("", "where scores go; empty: the run's folder")
    save_predictions: bool = option(False, "write the predicted masks and overlays as PNG")
    zero_shot: bool = option(True, "score the untuned SAM beside the tuned one")
    prompt: str = option(
        "", "score under another prompt than the run's; empty: the run's", ("", *PROMPTS)
    )
    prompts: str = option(
        "",
        "score under several prompts in one table, with commas between: exact_box, jittered_box, "
        "whole_image, centre_point, points, box+points, rough_mask, none",
    )
    protocol: str = option(
        "",
        "whose metrics: binary, cod, sod, shadow, polyp, semantic, gsam_soft, synapse, instances; "
        "empty: the data set's, else binary or, with classes, semantic",
    )
    protocol_mode: str = option(
        "", "which of the protocol's conventions; empty: its first (a wrong one lists them)"
    )
    precision: str = option(
        "fp32",
        "number format of the model; masks are upsampled and thresholded in fp32 in any case. bf16 "
        "is faster where the hardware has it and moves scores a little, so tables say fp32",
        ("fp32", "bf16", "fp16"),
    )


@dataclass(frozen=True)
class ImportOptions:
    """What is imported"""

    weights: str = option("", "the published .pth, .pt or .safetensors file")


@dataclass(frozen=True)
class MergeOptions:
    """What is merged"""

    run_dir: str = option("", "the run's folder, or its file; empty: the newest in checkpoints/")
    checkpoint: str = option("", "SAM's weights, if they moved since training")
    output: str = option("", "the .pth to write; empty: merged.pth in the run's folder")


@dataclass(frozen=True)
class ShardsOptions:
    """What is packed"""

    image_dir: str = option("", "images")
    mask_dir: str = option("", "their masks")
    list: str = option("", "file with an image and its mask per line, as --train_list")
    output_dir: str = option("", "folder for the shards")
    name: str = option("train", "start of their names: NAME-000000.tar, ...")
    pairs_per_shard: int = option(1000, "images with their masks in one shard; the last has fewer")


@dataclass(frozen=True)
class BenchmarkOptions:
    """Benchmark"""

    steps: int = option(10, "timed optimizer steps")
    warmup: int = option(2, "untimed steps before")
    num_classes: int = option(
        1, "K of 2 or more with --prompt none: the model answers with K masks"
    )
    rows: int = option(1, "questions about each image, under a --prompt")
    picture_size: Size = option(
        Size(0, 0),
        "size of the pictures on disk, where --loss_resolution original takes the loss, as "
        "image_size is said; 0: that of the frame",
    )
    evaluate: bool = option(False, "time scoring (forward pass and scores) instead of training")
    peak: bool = option(
        True,
        "also count the products of a step, measure how fast this device multiplies matrices, and "
        "say which share of that the steps reach; takes some seconds",
    )
    probe: bool = option(
        False,
        "find the largest --batch_size that fits into memory with these options, by trials in "
        "processes of their own; where not even one image fits, the cheapest switch that helps",
    )

    def __post_init__(self):
        object.__setattr__(self, "picture_size", Size.read(self.picture_size))


@dataclass(frozen=True)
class TrainConfig:
    """All that `train` can be told."""

    model: ModelOptions
    read: ReadOptions
    data: TrainDataOptions
    test: TestDataOptions
    loader: LoaderOptions
    prompts: PromptOptions
    loss: LossOptions
    optim: OptimOptions
    run: RunOptions
    log: LogOptions
    adapter: object  # the options of the chosen adapter


@dataclass(frozen=True)
class EvaluateConfig:
    """All that `evaluate` can be told; what is not said comes from the run that is scored."""

    evaluate: EvaluateOptions
    test: TestDataOptions
    read: ReadOptions
    loader: LoaderOptions
    given: dict  # what was said, by name


@dataclass(frozen=True)
class ImportConfig:
    """All that `import` can be told."""

    source: ImportOptions
    model: ModelOptions
    read: ReadOptions
    prompts: PromptOptions
    run: RunOptions
    adapter: object


@dataclass(frozen=True)
class BenchmarkConfig:
    """All that `benchmark` can be told."""

    benchmark: BenchmarkOptions
    model: ModelOptions
    loader: LoaderOptions
    prompts: PromptOptions
    loss: LossOptions
    optim: OptimOptions
    run: RunOptions
    adapter: object


def answers_classes(num_classes: int, prompt: str) -> bool:
    """Whether the model answers with a mask per class at once; else with one mask per row."""
    return num_classes > 1 and prompt == "none"


# What may differ when a run goes on (`--resume`); everything else stays as the run began.
FREE_ON_RESUME = {
    "epoch", "patience", "workers", "timeout", "save_pth", "log_every", "wandb", "wandb_mode",
    "project_name", "resume", "test_image_dir", "test_mask_dir", "test_slice", "test_list",
    "test_shards", "test_datasets", "test_data_root", "cache_dir", "cache_limit", "compile",
}  # fmt: skip

# Flags of the parent repository that torchrun has made needless: accepted, and said so.
RETIRED = {
    "dist": "torchrun decides: NGPU=4 ./run.sh starts four processes",
    "port": "torchrun chooses a free port (--standalone), or set --master_port there",
    "local_rank": "torchrun sets it in the environment",
}
