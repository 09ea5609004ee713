"""What is measured: groups of cells, in falling order of importance, and the presets.

A cell is one command in a process of its own. The cells of a group are run in turn, A B C A B C,
and compared within a round only: what slows a machine down slows all of a round. Imports nothing
heavy: the process that starts the cells must stay small, since a child's peak memory starts there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

BASE = "--model_type vit_b --image_size 1024"
ALL_ADAPTERS = (
    "decoder", "lora", "sam_adapter", "adaptformer", "conv_lora", "ts_sam", "samus", "gsam",
)  # fmt: skip
AT_256 = "--model_type vit_b --image_size 256"  # the frame of samus and gsam
TINY = "--model_type vit_mini --image_size 256"


@dataclass(frozen=True)
class Cell:
    """One command. program: a name in `run.PROGRAMS`. flags: as on a command line.

    processes: of torchrun, where more than none is asked for; threads: of each, 0: all cores.
    seconds: about how long it takes on two cores, or on a GPU, for the estimate that is printed.
    """

    name: str
    program: str
    flags: str = ""
    processes: int = 0
    threads: int = 0
    seconds: int = 60

    @property
    def settings(self) -> dict:
        """What must be equal for a measurement to count as this cell's."""
        return {
            "program": self.program,
            "flags": " ".join(self.flags.split()),
            "processes": self.processes,
            "threads": self.threads,
        }


@dataclass(frozen=True)
class Group:
    """Cells that are run in turn, `rounds` times. title: what the table calls it.

    apart: its cells are not compared with each other, so each may be measured on another day.
    """

    name: str
    title: str
    cells: tuple[Cell, ...]
    rounds: int = 1
    apart: bool = False


def _step(adapter: str, model: str, *more: str, steps: str = "--steps 2 --warmup 1") -> str:
    prompt = "--prompt none" if adapter == "ts_sam" else ""
    return " ".join((f"--adapter {adapter}", model, prompt, *more, steps))


def _ours(name: str, adapter: str, model: str, *more: str, seconds: int = 60, **words) -> Cell:
    steps = words.pop("steps", "--steps 2 --warmup 1")
    return Cell(
        name, "samtune", _step(adapter, model, *more, steps=steps), seconds=seconds, **words
    )


def _frame(adapter: str) -> str:
    return AT_256 if adapter in ("samus", "gsam") else BASE


FP32, BF16, COMPILED = "--precision fp32", "--precision bf16", "--precision bf16 --compile yes"

# --- two CPU cores: the rows of the table of targets -------------------------------------------

SAM_ADAPTER = Group(
    "sam_adapter",
    "SAM-Adapter, vit_b at 1024 px, a training step",
    (
        Cell("stock", "stock", _step("sam_adapter", BASE), seconds=65),
        _ours("fp32", "sam_adapter", BASE, FP32, seconds=55),
        _ours("bf16", "sam_adapter", BASE, BF16, seconds=35),
        _ours("last4", "sam_adapter", BASE, FP32, "--adapter_blocks 8-11", seconds=40),
    ),
    rounds=3,
)
LORA = Group(
    "lora",
    "LoRA, vit_b at 1024 px, a training step",
    (
        Cell("hf_peft", "hf_peft", _step("lora", BASE), seconds=70),
        _ours("fp32", "lora", BASE, FP32, seconds=55),
    ),
    rounds=3,
)
_DECODER = f"--adapter decoder {BASE} --augment none --precision fp32 --workers 1"
CACHE = Group(
    "cache",
    "decoder tuning, vit_b at 1024 px, epochs after the first",
    (
        Cell("uncached", "epochs", f"--images 4 --epoch 2 {_DECODER}", seconds=110),
        Cell(
            "cached",
            "epochs",
            f"--images 24 --epoch 4 {_DECODER} --batch_size 4 --cache_features fp32",
            seconds=260,
        ),
    ),
)
_AT_512 = "--model_type vit_b --image_size 512"
PROCESSES = Group(
    "processes",
    "SAM-Adapter, vit_b at 512 px, one thread per process",
    (
        _ours("1", "sam_adapter", _AT_512, FP32, processes=1, threads=1, seconds=35),
        _ours("2", "sam_adapter", _AT_512, FP32, processes=2, threads=1, seconds=45),
    ),
    rounds=3,
)
_FIRST = f"--images 1 --epoch 1 --picture_size 256 --first_step {TINY} --adapter sam_adapter"
LAUNCH = Group(
    "launch",
    "from launch on",
    (
        Cell("help", "help", seconds=1),
        Cell("first_step", "epochs", _FIRST, seconds=15),
    ),
    rounds=5,
)
CPU_TARGETS = (SAM_ADAPTER, LORA, CACHE, PROCESSES, LAUNCH)

# --- two CPU cores: the rest of the grid -------------------------------------------------------


def _adapters(kind: str, title: str, seconds: int, *more: str, side: int = 1024) -> Group:
    cells = (
        _ours(a, a, _frame(a).replace("1024", str(side)), *more, seconds=seconds)
        for a in ALL_ADAPTERS
    )
    return Group(f"adapters-{kind}", f"every adapter, {title}", tuple(cells), apart=True)


_EVALUATION = Group(
    "evaluation",
    "SAM-Adapter, vit_b at 1024 px, an image evaluated",
    tuple(
        Cell(name, program, _step("sam_adapter", BASE, flags, "--evaluate yes"), seconds=30)
        for name, program, flags in (
            ("stock", "stock", ""), ("fp32", "samtune", FP32), ("bf16", "samtune", BF16),
            ("compiled", "samtune", COMPILED),
        )
    ),
)  # fmt: skip
_FORMS = Group(
    "forms",
    "SAM-Adapter, vit_b at 1024 px: what a switch brings",
    (
        _ours("fp32", "sam_adapter", BASE, FP32),
        _ours("fp32-compiled", "sam_adapter", BASE, FP32, "--compile yes", seconds=110),
        _ours("bf16", "sam_adapter", BASE, BF16, seconds=40),
        _ours("bf16-compiled", "sam_adapter", BASE, COMPILED, seconds=100),
        _ours("fp32-checkpointed", "sam_adapter", BASE, FP32, "--activation_checkpointing yes"),
        _ours("official", "sam_adapter", BASE, "--variant official", FP32),
    ),
)
_FOUR = "--batch_size 4"  # at 1024 px the stock path would need more than 24 GiB for it
_BATCH = Group(
    "batch",
    "SAM-Adapter, vit_b at 512 px, 4 images in a step",
    (
        Cell("stock", "stock", _step("sam_adapter", _AT_512, _FOUR), seconds=90),
        _ours("fp32", "sam_adapter", _AT_512, FP32, _FOUR, seconds=70),
        _ours("bf16", "sam_adapter", _AT_512, BF16, _FOUR, seconds=50),
    ),
)
_SIZES = Group(
    "image_size",
    "SAM-Adapter, vit_b, by the side of the frame, a training step",
    tuple(
        cell
        for side in (256, 512, 768)
        for cell in (
            Cell(
                f"{side}-stock", "stock", _step("sam_adapter", f"--image_size {side}"), seconds=40
            ),
            _ours(f"{side}", "sam_adapter", f"--model_type vit_b --image_size {side}", FP32),
        )
    ),
)
_BACKBONES = Group(
    "backbones",
    "other backbones, a training step",
    tuple(
        _ours(f"{model}-{adapter}", adapter, f"--model_type {model}", FP32, seconds=25)
        for model, adapters in (
            ("vit_t", ("decoder", "lora", "conv_lora", "adaptformer")),
            ("vit_mini", ("decoder", "lora", "sam_adapter")),
        )
        for adapter in adapters
    ),
    apart=True,
)
_ROWS = Group(
    "rows",
    "SAM-Adapter, vit_b at 512 px, by questions per image, a training step",
    tuple(
        _ours(str(rows), "sam_adapter", _AT_512, FP32, f"--rows {rows}", seconds=25)
        for rows in (1, 4, 16, 32)
    ),
)
_IMAGES = Group(
    "images",
    "vit_mini, an epoch, by images in the data set (memory must stay flat)",
    tuple(
        Cell(
            str(images),
            "epochs",
            f"--images {images} --epoch 1 --picture_size 512 {TINY} --adapter sam_adapter "
            "--batch_size 4 --workers 1",
            seconds=15 + images // 4,
        )
        for images in (16, 64, 256)
    ),
)
_LORA_BF16 = Group(
    "lora-bf16",
    "LoRA in bf16, vit_b at 1024 px, a training step",
    (
        Cell("hf_peft", "hf_peft", _step("lora", BASE, BF16), seconds=60),
        _ours("bf16", "lora", BASE, BF16, seconds=40),
    ),
)
_ATTENTION = Group(
    "attention",
    "forms of attention, vit_b's global block at 1024 px, forward and backward",
    tuple(
        Cell(name, "attention", f"--form {name} --steps 2", seconds=25)
        for name in ("stock", "chunked", "augmented", "biased")
    ),
)
CPU_GRID = (
    _adapters("fp32", "a training step in fp32", 60, FP32),
    _FORMS,
    _EVALUATION,
    _LORA_BF16,
    _ATTENTION,
    _adapters("bf16", "a training step in bf16", 40, BF16),
    _IMAGES,
    _ROWS,
    _BACKBONES,
    _SIZES,
    _BATCH,
    _adapters("evaluation", "an image evaluated in bf16", 25, BF16, "--evaluate yes"),
    _adapters(
        "512", "vit_b at 512 px (samus and gsam: 256), a training step in bf16", 25, BF16, side=512
    ),
    _adapters("compiled", "the same, compiled", 80, COMPILED, side=512),
)

# --- a GPU: 8 minutes --------------------------------------------------------------------------

_TEN = "--steps 10 --warmup 3"
_EIGHT = "--batch_size 8"


def _on_gpu(name: str, adapter: str, *more: str, seconds: int = 30) -> Cell:
    return _ours(name, adapter, _frame(adapter), *more, steps=_TEN, seconds=seconds)


GPU_TARGETS = (
    Group(
        "gpu-sam_adapter",
        "SAM-Adapter, vit_b at 1024 px, 8 images in a step",
        (
            Cell("stock", "stock", _step("sam_adapter", BASE, _EIGHT, steps=_TEN), seconds=30),
            _on_gpu("compiled", "sam_adapter", COMPILED, _EIGHT, seconds=45),
        ),
        rounds=2,
    ),
    Group(
        "gpu-lora",
        "LoRA in bf16, vit_b at 1024 px, 8 images in a step",
        (
            Cell("hf_peft", "hf_peft", _step("lora", BASE, BF16, _EIGHT, steps=_TEN), seconds=25),
            _on_gpu("compiled", "lora", COMPILED, _EIGHT, seconds=45),
        ),
        rounds=2,
    ),
)
GPU_GRID = (
    Group(
        "gpu-attention",
        "forms of attention, vit_b's global block, 8 images, bf16",
        tuple(
            Cell(n, "attention", f"--form {n} {_EIGHT} --precision bf16 --steps 20", seconds=10)
            for n in ("stock", "augmented", "biased", "flexible")
        ),
    ),
    Group(
        "gpu-adapters",
        "every adapter, bf16 and compiled, 8 images in a step",
        tuple(
            _on_gpu(a, a, COMPILED, _EIGHT, seconds=40)
            for a in ALL_ADAPTERS
            if a not in ("sam_adapter", "lora")
        ),
        apart=True,
    ),
    Group(
        "gpu-forms",
        "SAM-Adapter, vit_b at 1024 px, 8 images: what a switch brings",
        (
            _on_gpu("fp32", "sam_adapter", FP32, _EIGHT),
            _on_gpu("tf32", "sam_adapter", FP32, "--tf32 yes", _EIGHT),
            _on_gpu("bf16", "sam_adapter", BF16, _EIGHT),
            _on_gpu("last4", "sam_adapter", COMPILED, "--adapter_blocks 8-11", _EIGHT),
        ),
    ),
    Group(
        "gpu-batch",
        "SAM-Adapter, vit_b at 1024 px, bf16 and compiled, by images in a step",
        tuple(
            _on_gpu(str(n), "sam_adapter", COMPILED, f"--batch_size {n}", seconds=40)
            for n in (1, 4, 16)
        ),
        apart=True,
    ),
    Group(
        "gpu-evaluation",
        "SAM-Adapter, vit_b at 1024 px, 8 images evaluated",
        (
            Cell(
                "stock",
                "stock",
                _step("sam_adapter", BASE, _EIGHT, "--evaluate yes", steps=_TEN),
                seconds=20,
            ),
            _on_gpu("compiled", "sam_adapter", COMPILED, _EIGHT, "--evaluate yes", seconds=35),
        ),
    ),
)

# --- does everything run? ----------------------------------------------------------------------


def _small(group: Group) -> Group:
    """The same cells on vit_mini at 256 px, one step each: that they run, not how fast."""
    cells = []
    for cell in group.cells:
        flags = cell.flags.replace("vit_b", "vit_mini").replace("1024", "256").replace("512", "256")
        for count in ("--steps 2", "--steps 10", "--steps 20"):
            flags = flags.replace(count, "--steps 1")
        flags = flags.replace("--images 24", "--images 8").replace("8-11", "4-5")
        cells.append(replace(cell, flags=flags, seconds=12))
    return replace(group, cells=tuple(cells), rounds=1)


QUICK = tuple(_small(group) for group in CPU_TARGETS)

PRESETS = {
    "quick": QUICK,
    "cpu": CPU_TARGETS + CPU_GRID,
    "gpu": GPU_TARGETS + GPU_GRID,
}
MINUTES = {"quick": 0, "cpu": 0, "gpu": 7}  # what a preset may take; 0: as long as it takes
