"""The verb `adapters`: what there is to choose from, counted; the README holds what it prints."""

from __future__ import annotations

from samtune.adapters import ADAPTERS
from samtune.adapters.base import Adapter
from samtune.complexity import build_weightless, count_macs, count_trainable
from samtune.config import PROMPTS, ModelOptions
from samtune.models import MODEL_TYPES

COLUMNS = (
    "`--adapter`", "what it does", "trainable", "MACs", "prompts", "frame, px", "backbones",
    "classes", "source",
)  # fmt: skip
MODEL_TYPE = "vit_b"
# Forms beside the defaults: an adapter and the flags that make the difference.
FORMS = (
    ("decoder", {"model_type": "vit_t"}),
    ("decoder", {"model_type": "vit_l"}),
    ("decoder", {"model_type": "vit_h"}),
    ("sam_adapter", {"variant": "official"}),
    ("sam_adapter", {"adapter_blocks": "8-11"}),
    ("ts_sam", {"model_type": "vit_h"}),
    ("ts_sam", {"use_fft": True}),
    ("adaptformer", {"form": "gsam"}),
    ("adaptformer", {"form": "spatial"}),
    ("samus", {"freeze_decoder": True}),
    ("gsam", {"image_size": 128}),
    ("lora", {"targets": "q,k,v"}),
    ("lora", {"adapt_decoder": True}),
    ("lora", {"form": "gsam"}),
    ("conv_lora", {"form": "gsam"}),
)
EXPLANATION = """
trainable: numbers that training changes, with `--model_type {model_type}`, pretrained weights and
default options. MACs: multiply-accumulates of one image's forward pass without a prompt: all matrix
products, convolutions and attention products, nothing else. prompts: any is {any}.
backbones: `vit` is {vit}; `tiny_vit` is {tiny_vit}. Other forms:

"""


def run() -> str:
    """The adapters as Markdown: a row each, then other forms of them."""
    adapters = [_row(row) for row in ADAPTERS.values()]
    forms = [_form(name, flags) for name, flags in FORMS]
    names = {
        family: ", ".join(f"`{n}`" for n, sizes in MODEL_TYPES.items() if sizes.backbone == family)
        for family in ("vit", "tiny_vit")
    }
    names["any"] = ", ".join(f"`{prompt}`" for prompt in PROMPTS)
    explanation = EXPLANATION.format(model_type=MODEL_TYPE, **names)
    return (
        format_table(COLUMNS, adapters)
        + explanation
        + format_table(("flags", "trainable", "MACs"), forms)
    )


def format_table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def frame_rule(row: Adapter) -> str:
    """Which sides the frame of an adapter on SAM's ViT may have."""
    patch = MODEL_TYPES[MODEL_TYPE].patch_size
    return f"any from {patch} on" if row.any_size else f"multiples of {row.stride or patch}"


def _row(row: Adapter) -> list[str]:
    """What the first table says of an adapter."""
    prompts = "any" if row.prompts == PROMPTS else ", ".join(row.prompts)
    classes = "one or several" if row.several_classes else "one"
    return [
        f"`{row.name}`", row.summary, *_counts(row, {}), prompts, frame_rule(row),
        ", ".join(row.backbones), classes, row.source,
    ]  # fmt: skip


def _form(name: str, flags: dict) -> list[str]:
    """What the second table says of a form."""
    said = {key: "yes" if value is True else value for key, value in flags.items()}
    line = " ".join([f"--adapter {name}", *(f"--{key} {value}" for key, value in said.items())])
    return [f"`{line}`", *_counts(ADAPTERS[name], flags)]


def _counts(row: Adapter, flags: dict) -> tuple[str, str]:
    """Trainable parameters and MACs; `flags` are the model's or the adapter's own."""
    own = dict(flags)
    model_type = own.pop("model_type", MODEL_TYPE)
    size = own.pop("image_size", 0)
    asked = ModelOptions(model_type, adapter=row.name, image_size=size, train="adapter")
    frame = row.frame_size(asked)
    model = build_weightless(asked, row.options(**own))
    giga = count_macs(model, frame) / 1e9
    return f"{count_trainable(model):,}", f"{giga:,.1f} G at {frame}"
