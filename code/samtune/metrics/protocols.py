"""PROTOCOLS: which numbers a field reports, under which conventions, one literal row each.

A protocol has modes: the first is the default, the others reproduce what a published repository
prints. Importing this imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from samtune.errors import UserError

ORIGINAL, SQUARE = "original", "square"  # the file's own size; the model's frame, truth by nearest


@dataclass(frozen=True)
class Mode:
    """One set of conventions.

    metrics: (name of a metric, its settings) each, for `scoring.build_metric`. headlines: what a
    table shows; the first one chooses the best epoch. resolution: where the scores are taken,
    `ORIGINAL` or `SQUARE`.
    """

    summary: str
    metrics: tuple[tuple[str, dict], ...]
    headlines: tuple[str, ...]
    resolution: str = ORIGINAL


@dataclass(frozen=True)
class Protocol:
    """What a field reports.

    answer: the form of `measure.Answer` that it reads. unit: what one row of the table and one
    draw of the bootstrap is. classes: 1 (foreground or not) or 2 (the least number of class ids).
    """

    summary: str
    answer: str
    modes: dict[str, Mode]
    unit: str = "picture"
    classes: int = 1


LOWER_IS_BETTER = frozenset(
    {"MAE", "HD95", "BER", "shadow_error", "non_shadow_error"}
    | {f"{name}_image_mean" for name in ("BER", "shadow_error", "non_shadow_error")}
    | {f"BER_{cut}" for cut in ("adaptive", "binary", "mean", "max", "binary_pooled")}
)

_GREY_MAP = (("StructureMeasure", {}), ("WeightedF", {}), ("MeanAbsoluteError", {}))
_ADAPTER_MAP = (  # the evaluation code that SAM-Adapter and TS-SAM share
    ("StructureMeasure", {"degenerate": "zero"}),
    ("WeightedF", {"beta2": 0.3}),
    ("MeanAbsoluteError", {}),
    ("Curve", {"kind": "E"}),
    ("Curve", {"kind": "F", "beta2": 1.0}),
)
_E_AND_F = (("Curve", {"kind": "E"}), ("Curve", {"kind": "F", "beta2": 0.3}))
_ADAPTER = Mode(
    summary="SAM-Adapter 665145d and TS-SAM edd171c: weighted F with beta^2 0.3, at the frame",
    metrics=_ADAPTER_MAP,
    headlines=("S_measure", "E_mean", "weighted_F", "MAE"),
    resolution=SQUARE,
)
_REGION = (("PooledOverlap", {}), ("BoundaryIoU", {}))
_OBJECTS = (("SegmentationAccuracy", {}), ("AveragePrecision", {}))

PROTOCOLS: dict[str, Protocol] = {
    "binary": Protocol(
        summary="IoU and Dice of one foreground, the mean over pictures",
        answer="probability",
        modes={
            "finetune_sam": Mode(
                summary="1e-3 pixels added to each fraction (Kyyle2114/Fine-tuning-SAM a7cf899)",
                metrics=(("Overlap", {"smooth": 1e-3}), *_REGION),
                headlines=("iou", "dice"),
            ),
            "exact": Mode(
                summary="nothing added; both masks empty score 1",
                metrics=(("Overlap", {}), *_REGION),
                headlines=("iou", "dice"),
            ),
        },
    ),
    "cod": Protocol(
        summary="camouflaged objects: S, mean E, weighted F, MAE of the stretched map",
        answer="probability",
        modes={
            "literature": Mode(
                summary="as PySODMetrics: alpha 0.5, beta^2 1 of weighted F, 0.3 of F",
                metrics=(*_GREY_MAP, *_E_AND_F),
                headlines=("S_measure", "E_mean", "weighted_F", "MAE"),
            ),
            "adapter": _ADAPTER,
        },
    ),
    "sod": Protocol(
        summary="salient objects: maximal and mean F, S, mean E, MAE of the stretched map",
        answer="probability",
        modes={
            "literature": Mode(
                summary="as PySODMetrics: beta^2 0.3 of F, 1 of weighted F, alpha 0.5",
                metrics=(*_GREY_MAP, *_E_AND_F),
                headlines=("S_measure", "F_max", "F_mean", "E_mean", "weighted_F", "MAE"),
            ),
            "adapter": _ADAPTER,
        },
    ),
    "shadow": Protocol(
        summary="shadows: the balanced error rate (BER) in percent",
        answer="probability",
        modes={
            "literature": Mode(
                summary="pixels of the set pooled (xw-hu/CUHK-Shadow e58784a)",
                metrics=(("BalancedError", {}),),
                headlines=("BER", "shadow_error", "non_shadow_error"),
            ),
            "adapter": Mode(
                summary="BER of each picture, then the mean (SAM-Adapter 665145d, TS-SAM edd171c)",
                metrics=(("BalancedError", {}),),
                headlines=tuple(
                    f"{name}_image_mean" for name in ("BER", "shadow_error", "non_shadow_error")
                ),
                resolution=SQUARE,
            ),
        },
    ),
    "polyp": Protocol(
        summary="polyps: mean Dice and IoU, with S, E, weighted F and MAE",
        answer="probability",
        modes={
            "literature": Mode(
                summary="Dice and IoU per picture at probability 0.5; also by threshold",
                metrics=(
                    ("Overlap", {}),
                    *_GREY_MAP,
                    ("Curve", {"kind": "E"}),
                    ("Curve", {"kind": "dice"}),
                    ("Curve", {"kind": "iou"}),
                ),
                headlines=("dice", "iou", "S_measure", "E_max", "weighted_F", "MAE"),
            ),
        },
    ),
    "semantic": Protocol(
        summary="several classes: mean IoU and accuracies from one confusion matrix",
        answer="labels",
        classes=2,
        modes={
            "literature": Mode(
                summary="classes that appear nowhere are left out of the mean",
                metrics=(("Classes", {}),),
                headlines=("mIoU", "pixel_accuracy", "class_accuracy"),
            ),
            "gsam": Mode(
                summary="the same at the frame (usagisukisuki/G-SAM 31dfd1c, validation)",
                metrics=(("Classes", {}),),
                headlines=("mIoU",),
                resolution=SQUARE,
            ),
        },
    ),
    "gsam_soft": Protocol(
        summary="several classes: soft IoU, the test script of usagisukisuki/G-SAM 31dfd1c",
        answer="class_probability",
        classes=2,
        modes={
            "gsam": Mode(
                summary="over the set, at the frame; not comparable with a hard mean IoU",
                metrics=(("SoftClasses", {}),),
                headlines=("soft_mIoU",),
                resolution=SQUARE,
            ),
        },
    ),
    "synapse": Protocol(
        summary="organs in volumes: Dice and HD95 per organ; class 0 is background",
        answer="labels",
        unit="volume",
        classes=2,
        modes={
            "published": Mode(
                summary="SAMed e351840 and TransUNet: their rule for organs that are not there",
                metrics=(("Organs", {"empty": "published"}),),
                headlines=("dice", "HD95"),
            ),
            "strict": Mode(
                summary="undefined values are left out and counted",
                metrics=(("Organs", {"empty": "strict"}),),
                headlines=("dice", "HD95"),
            ),
        },
    ),
    "instances": Protocol(
        summary="objects: segmentation accuracy over IoU 0.50..0.95, and COCO's AP",
        answer="instances",
        modes={
            "literature": Mode(
                summary="mSA per picture (DSB 2018, micro-sam 3acdcd7); AP over the set (COCO)",
                metrics=_OBJECTS,
                headlines=("mSA", "SA50", "SA75", "AP"),
            ),
        },
    ),
}


def lower_is_better(score: str) -> bool:
    """Whether less of this score is better; "HD95/spleen" is judged as "HD95"."""
    return score.split("/")[0] in LOWER_IS_BETTER


def choose(protocol: str, mode: str = "", num_classes: int = 1) -> tuple[Protocol, str, Mode]:
    """The protocol, and its mode's name (the first one's for "") and row.

    num_classes: 1 for one foreground, else the number of class ids. Raises UserError for an
    unknown name, and for a protocol that does not fit the number of classes.
    """
    row = PROTOCOLS.get(protocol)
    if row is None:
        raise UserError(f"--protocol {protocol}: {_instead(protocol, PROTOCOLS)}")
    mode = mode or next(iter(row.modes))
    if mode not in row.modes:
        raise UserError(f"protocol {protocol} has no mode {mode}: {_instead(mode, row.modes)}")
    if (row.classes == 1) != (num_classes == 1):
        fitting = [name for name, p in PROTOCOLS.items() if (p.classes == 1) == (num_classes == 1)]
        needs = "one foreground class" if row.classes == 1 else "two classes or more"
        raise UserError(
            f"--protocol {protocol} scores {needs} and --num_classes is {num_classes}; for that "
            f"take one of {', '.join(fitting)}"
        )
    return row, mode, row.modes[mode]


def _instead(name: str, known) -> str:
    close = get_close_matches(name, known, 1)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
