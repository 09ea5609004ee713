"""The ways to adapt SAM, and the one door to an adapted model.

A new adapter is one file beside this one and one row in `ADAPTERS`. Importing this imports nothing
heavy.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from samtune.adapters.base import Adapter
from samtune.adapters.options import (
    AdaptFormerOptions,
    ConvLoraOptions,
    DecoderOptions,
    GsamOptions,
    LoraOptions,
    SamAdapterOptions,
    SamusOptions,
    TsSamOptions,
)
from samtune.adapters.published import samed_renames
from samtune.config import PROMPTS, ModelOptions, answers_classes
from samtune.errors import UserError

if TYPE_CHECKING:
    from samtune.models.sam import Sam
    from samtune.models.segmenter import PromptedSam
    from samtune.models.weights import LoadReport

ADAPTERS: dict[str, Adapter] = {
    "decoder": Adapter(
        name="decoder",
        summary="trains the mask decoder, the image encoder as it is",
        options=DecoderOptions,
        module="samtune.adapters.decoder",
        prompts=PROMPTS,
        backbones=("vit", "tiny_vit"),
        source="arXiv 2304.02643; Kyyle2114/Fine-tuning-Segment-Anything a7cf899",
        mergeable=True,
        renames=((r"^image_encoder\.(norm_head|head)\..*$", None),),  # MobileSAM's classifier
    ),
    "sam_adapter": Adapter(
        name="sam_adapter",
        summary="adds high-frequency and patch features to every block of the image encoder",
        options=SamAdapterOptions,
        module="samtune.adapters.sam_adapter",
        prompts=PROMPTS,
        backbones=("vit",),
        source="arXiv 2304.09148; Kyyle2114/SAM-Adapter-Pytorch-Implementation 66b0e9e (parent), "
        "tianrun-chen/SAM-Adapter-PyTorch 665145d (official)",
        renames=(
            (  # aliases of the projection that all blocks share
                r"^image_encoder\.task_adapter_blocks\.\d+\.up_projection(\..*)$",
                r"image_encoder.task_adapter_up\1",
            ),
            (r"^(no_mask_embed\..*)$", r"prompt_encoder.\1"),
            (r"^(pe_layer\..*)$", r"prompt_encoder.\1"),
        ),
        needs="blocks that share one width and one grid with the patches",
    ),
    "ts_sam": Adapter(
        name="ts_sam",
        summary="a side stream beside the image encoder, refined at three scales, and a decoder of "
        "its own",
        options=TsSamOptions,
        module="samtune.adapters.ts_sam",
        prompts=("none",),
        several_classes=False,
        backbones=("vit",),
        source="arXiv 2408.01835; maoyangou147/TS-SAM edd171c",
        renames=((r"^(no_mask_embed|pe_layer)\..*$", None),),  # SAM-Adapter's, which it grew from
        needs="blocks that share one width and one grid with the patches",
    ),
    "adaptformer": Adapter(
        name="adaptformer",
        summary="adds a bottleneck beside the MLP of every block of the image encoder",
        options=AdaptFormerOptions,
        module="samtune.adapters.adaptformer",
        prompts=PROMPTS,
        backbones=("vit", "tiny_vit"),
        source="arXiv 2205.13535; ShoufaChen/AdaptFormer 6967d67 (original), "
        "usagisukisuki/G-SAM 31dfd1c (gsam, spatial; arXiv 2408.12406)",
    ),
    "samus": Adapter(
        name="samus",
        summary="adds a convolution branch that the blocks of global attention read, at 256 px",
        options=SamusOptions,
        module="samtune.adapters.samus",
        prompts=PROMPTS,
        backbones=("vit",),
        source="arXiv 2309.06824; xianlin7/SAMUS 030ed07, usagisukisuki/G-SAM 31dfd1c (the same)",
        image_size=256,
        stride=8,
        needs="patches that can overlap",
    ),
    "gsam": Adapter(
        name="gsam",
        summary="takes images of any size and aspect, with a CNN beside the image encoder",
        options=GsamOptions,
        module="samtune.adapters.gsam",
        prompts=PROMPTS,
        backbones=("vit",),
        source="arXiv 2408.12406; usagisukisuki/G-SAM 31dfd1c",
        renames=(  # the CNN lies in published files twice; its end, which nothing reads, once
            (r"^image_encoder\.cnn_embed\.backbone\.(layer4|fc)\..*$", None),
            (r"^(image_encoder\.cnn_embed\.)backbone\.layer1(\..*)$", r"\1res2\2"),
            (r"^(image_encoder\.cnn_embed\.)backbone\.layer2(\..*)$", r"\1res3\2"),
            (r"^(image_encoder\.cnn_embed\.)backbone\.layer3(\..*)$", r"\1res4\2"),
            (r"^(image_encoder\.cnn_embed\.)backbone\.(.*)$", r"\1\2"),
        ),
        image_size=256,
        stride=8,
        needs="patches that can overlap",
        any_size=True,
        start_options=("cnn_weights",),
    ),
    "lora": Adapter(
        name="lora",
        summary="adds low-rank terms to q and v of every attention in the image encoder",
        options=LoraOptions,
        module="samtune.adapters.lora",
        prompts=PROMPTS,
        backbones=("vit", "tiny_vit"),
        source="arXiv 2106.09685; hitachinsk/SAMed e351840 (samed; arXiv 2304.13785), "
        "usagisukisuki/G-SAM 31dfd1c (gsam; arXiv 2408.12406)",
        mergeable=True,
        renames=(
            (r"^(image_encoder\.blocks\.\d+)\.(lora_[qkv]\..*)$", r"\1.attn.qkv.\2"),
            (r"^(.*\.attn\.qkv)\.qkv\.(weight|bias)$", r"\1.\2"),
            *samed_renames(),
        ),
    ),
    "conv_lora": Adapter(
        name="conv_lora",
        summary="adds a low-rank term with a mixture of convolutions to q, k and v of every block",
        options=ConvLoraOptions,
        module="samtune.adapters.conv_lora",
        prompts=PROMPTS,
        backbones=("vit", "tiny_vit"),
        source="arXiv 2401.17868; autogluon/autogluon f34ebb4f6 (original), "
        "usagisukisuki/G-SAM 31dfd1c (gsam; arXiv 2408.12406)",
        renames=(
            (r"^(image_encoder\.blocks\.\d+)\.(lora_[qkv]\..*)$", r"\1.attn.qkv.\2"),
            (r"^.*\.lora_moe_gating\.(mean|std)$", None),  # of the normal distribution: 0 and 1
        ),
    ),
}


def build_model(
    options: ModelOptions,
    adapter_options,
    prompt: str,
    checkpoint: Path | None,
    seed: int,
    num_classes: int = 1,
) -> PromptedSam:
    """SAM with its base weights, adapted, thawed where it trains, on the CPU in eval mode.

    num_classes: with 2 or more and the prompt "none", the decoder answers with a mask per class.
    checkpoint: the base weights, None for random ones. The global random state is left untouched;
    equal seeds give equal models, and `build_untuned` the same base. Raises UserError for a
    combination that the adapter refuses or a checkpoint that does not fit.
    """
    from samtune.adapters.layers import seeded

    if options.adapter not in ADAPTERS:
        raise UserError(f"--adapter {options.adapter}: choose from {', '.join(ADAPTERS)}")
    adapter = ADAPTERS[options.adapter]
    adapter.check(options, prompt, num_classes)
    base = replace(options, image_size=0) if adapter.any_size else options
    sam, report = _frozen_base(base, checkpoint, seed, adapter.stride)
    if answers_classes(num_classes, prompt):
        report = _give_classes(sam, num_classes, options.class_layout, report, seed)
    if adapter.any_size:
        sam.prompt_encoder.input_image_size = tuple(adapter.frame_size(options))
    with seeded(seed + 1):
        model = adapter.build(sam, adapter_options)
    _thaw(model, options, prompt, whole=options.train == "auto" and checkpoint is None)
    return _account(model, report).eval()


def _thaw(model: PromptedSam, options: ModelOptions, prompt: str, whole: bool) -> None:
    """What --train adds to what the adapter itself trains. whole: as 'all' does."""
    from samtune.adapters.layers import thaw_decoder, thaw_prompt_encoder

    if whole or options.train == "all":
        model.image_encoder.requires_grad_(True)
        thaw_decoder(model)
        thaw_prompt_encoder(model, prompt)
    elif options.train == "prompt_encoder":
        if not hasattr(model, "prompt_encoder"):
            raise UserError(
                f"--train prompt_encoder: --adapter {options.adapter} takes no prompts and has none"
            )
        thaw_prompt_encoder(model, prompt)


def build_untuned(
    options: ModelOptions,
    checkpoint: Path | None,
    seed: int,
    num_classes: int = 1,
    prompt: str = "none",
) -> PromptedSam:
    """Stock SAM in the adapter's frame, all frozen: what `build_model` with the same arguments
    starts from, but that patches lie side by side.
    """
    from samtune.models.segmenter import PromptedSam

    sam, report = _frozen_base(options, checkpoint, seed)
    if answers_classes(num_classes, prompt):
        report = _give_classes(sam, num_classes, options.class_layout, report, seed)
    return _account(PromptedSam(sam), report).eval()


def _frozen_base(
    options: ModelOptions, checkpoint: Path | None, seed: int, stride: int = 0
) -> tuple[Sam, LoadReport | None]:
    from samtune.adapters.layers import seeded
    from samtune.models.sam import build_sam
    from samtune.models.weights import load_base

    frame_size = ADAPTERS[options.adapter].frame_size(options)
    with seeded(seed):
        sam = build_sam(options.model_type, frame_size, stride, options.normalisation)
    report = load_base(sam, checkpoint) if checkpoint else None
    return sam.requires_grad_(False), report


def _give_classes(
    sam: Sam, num_classes: int, layout: str, report: LoadReport | None, seed: int
) -> LoadReport | None:
    from samtune.adapters.layers import seeded
    from samtune.models.weights import give_classes

    try:
        with seeded(seed + 2):
            report = give_classes(sam, num_classes, layout, report)
    except ValueError as error:
        raise UserError(f"--num_classes {num_classes}: {error}") from None
    sam.requires_grad_(False)
    return report


def _account(model: PromptedSam, report: LoadReport | None) -> PromptedSam:
    """Note which tensors the base checkpoint brought, and which are the adapter's own.

    What the adapter left out of SAM counts as unused.
    """
    if report is not None:
        base, names = {*report.loaded, *report.resized}, model.state_dict().keys()
        model.load_report = replace(
            report,
            loaded=tuple(name for name in report.loaded if name in names),
            resized=tuple(name for name in report.resized if name in names),
            new=tuple(name for name in names if name not in base and name not in report.reset),
            unused=report.unused + tuple(sorted(base - names)),
        )
        model.base_keys = frozenset(base & names) - model.own_keys
    return model
