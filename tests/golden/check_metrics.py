"""Fixtures of metrics: published libraries and evaluation scripts, and degenerate cases.

Where a library's convention is not ours, the number is checked through the mode that names it, or
through our counts put into the library's formula.
"""

from __future__ import annotations

import numpy as np
import torch
from fixture import Fixture

from samtune.metrics.curves import Curve, cut_at_levels
from samtune.metrics.instances import (
    AveragePrecision,
    SegmentationAccuracy,
    accuracies,
    mask_ious,
    masks_of,
)
from samtune.metrics.measure import Answer, Metric, means, stretched
from samtune.metrics.overlap import Overlap, PooledOverlap
from samtune.metrics.saliency import MeanAbsoluteError, StructureMeasure, WeightedF
from samtune.metrics.semantic import Classes, SoftClasses, confusion
from samtune.metrics.shadow import BalancedError
from samtune.metrics.surface import (
    BoundaryIoU,
    boundary_thickness,
    hd95,
    surface_dice,
    surface_distances,
)
from samtune.metrics.volumes import Organs
from samtune.structures import IGNORE

EXACT = 1e-9  # float64 references
SINGLE = 1e-5  # references that computed in float32
MONAI = 1e-4
GSAM = 1e-7  # its 1e-7 is a float32, and so is what it is taken off


class Expected:
    """The outputs of a fixture; every one has to be asked for before the end."""

    def __init__(self, fixture: Fixture):
        self.left = {name: t.numpy() for name, t in fixture.group("output.").items()}

    def equal(self, name: str, actual, tolerance: float = EXACT) -> None:
        expected = self.left.pop(name)
        actual = np.asarray(actual, np.float64).reshape(expected.shape)
        np.testing.assert_allclose(
            actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True, err_msg=name
        )


class Measurer:
    """Binary pairs, measured by any metric: columns of each, and the score of all."""

    def __init__(self, truths: np.ndarray, maps: np.ndarray):
        self.pairs = [(t, Answer(probability=m)) for t, m in zip(truths, maps, strict=True)]

    def columns(self, metric: Metric, name: str) -> list[float]:
        return [metric.measure(*pair).columns[name] for pair in self.pairs]

    def sums(self, metric: Metric) -> list[np.ndarray]:
        return [metric.measure(*pair).sums for pair in self.pairs]

    def scores(self, metric: Metric) -> dict:
        return metric.summarise(np.sum(self.sums(metric), 0))


def check_metrics(fixture: Fixture) -> None:
    inputs = {name: t.numpy() for name, t in fixture.group("input.").items()}
    for name, value in fixture.json["scalars"].items():
        np.testing.assert_allclose(fixture[f"output.scalar.{name}"].item(), value, equal_nan=True)
    expected = Expected(fixture)
    truths = (inputs["gt"] > 128).astype(np.uint8)
    pairs = Measurer(truths, inputs["pred"] / 255)
    _check_saliency(expected, pairs)
    _check_handlers(expected, pairs)
    _check_degenerate(expected, inputs)
    _check_adapter(expected, truths, inputs)
    _check_regions(expected, pairs, fixture.config)
    _check_shadow(expected, truths, inputs)
    _check_classes(expected, inputs, fixture.config["mc"])
    _check_soft(expected, inputs)
    _check_volumes(expected, inputs, fixture.config)
    _check_instances(expected, inputs)
    # Sub-voxel surface areas are another quantity than the voxel counts that we report.
    del expected.left["vol_nsd_tol1_tol2_mm_surface_distance"]
    assert not expected.left, f"not checked: {sorted(expected.left)}"


def _check_saliency(expected: Expected, pairs: Measurer) -> None:
    for metric, column, mean, rows in (
        (StructureMeasure(degenerate="nan"), "S_measure", "sm", "sm"),
        (StructureMeasure(stretch=False), "S_measure", "sm_no_minmax", "sm_no_minmax"),
        (MeanAbsoluteError(), "MAE", "mae_minmax", "mae_minmax"),
        (MeanAbsoluteError(stretch=False), "MAE", "mae_raw", "mae_raw"),
        (MeanAbsoluteError(stretch=False), "MAE", "mae_no_minmax", None),
        (WeightedF(), "weighted_F", "wfm_beta1", "wfm_beta1"),
        (WeightedF(beta2=0.3), "weighted_F", "wfm_beta03", "wfm_beta0.3"),
        (WeightedF(stretch=False), "weighted_F", "wfm_no_minmax", None),
    ):
        expected.equal(f"scalar.{mean}", pairs.scores(metric)[column])
        if rows:
            expected.equal(f"{rows}_per_image", pairs.columns(metric, column))
    for kind, prefix, rows in (("E", "em", "em"), ("F", "fm", "fm_beta0.3")):
        curve = Curve(kind)
        scores = pairs.scores(curve)
        for part in ("adaptive", "mean", "max"):
            expected.equal(f"scalar.{prefix}_{part}", scores[f"{kind}_{part}"])
        expected.equal(f"{rows}_adaptive_per_image", pairs.columns(curve, f"{kind}_adaptive"))
        expected.equal(f"{rows}_curve_per_image", [s[3 : 3 + 256] for s in pairs.sums(curve)])
    _check_precision(expected, pairs)


def _check_precision(expected: Expected, pairs: Measurer) -> None:
    precision, recall = [], []
    for truth, answer in pairs.pairs:
        counts = cut_at_levels(stretched(answer.probability, truth != IGNORE).ravel(),
                               truth.ravel() == 1)  # fmt: skip
        precision.append(counts.tp / np.maximum(counts.tp + counts.fp, 1))
        recall.append(counts.tp / np.maximum(counts.tp + counts.fn, 1))
    expected.equal("precision_curve", np.mean(precision, 0))
    expected.equal("recall_curve", np.mean(recall, 0))


def _check_handlers(expected: Expected, pairs: Measurer) -> None:
    names = {
        "adaptive": "adaptive",
        "binary_samplewise": "binary",
        "dynamic_mean": "mean",
        "dynamic_max": "max",
        "binary_pooled": "binary_pooled",
    }
    for kind, prefix in (("iou", "iou"), ("dice", "dice"), ("BER", "ber"), ("F", "f")):
        scores = pairs.scores(Curve(kind))
        for theirs, ours in names.items():
            name = f"scalar.v2_{prefix}_{theirs}"
            if name in expected.left:
                expected.equal(name, scores[f"{kind}_{ours}"])


def _check_degenerate(expected: Expected, inputs: dict) -> None:
    truths = (inputs["degenerate_gt"] > 128).astype(np.uint8)
    pairs = Measurer(truths, inputs["degenerate_pred"] / 255)
    library = expected.left["degenerate_sm_pysodmetrics"]
    for mode, name in (("nan", "pysodmetrics"), ("zero", "adapter_repo")):
        values = pairs.columns(StructureMeasure(degenerate=mode), "S_measure")
        expected.equal(f"degenerate_sm_{name}", values)
    ours = np.array(pairs.columns(StructureMeasure(), "S_measure"))
    known = ~np.isnan(library)
    np.testing.assert_allclose(ours[known], library[known], rtol=EXACT)
    assert ((ours >= 0) & (ours <= 1)).all()


def _check_adapter(expected: Expected, truths: np.ndarray, inputs: dict) -> None:
    """The evaluation code of SAM-Adapter, which works in float32."""
    pairs = Measurer(truths, inputs["pred"].astype(np.float32) / np.float32(255))
    for name, metric, column in _adapter_metrics():
        expected.equal(f"scalar.adapter_cod_{name}", pairs.scores(metric)[column], SINGLE)
    two = inputs["two_class_indices"]
    scores = Measurer(truths[two], inputs["pred"][two].astype(np.float32) / np.float32(255)).scores(
        BalancedError()
    )
    for name, ours in (
        ("ber", "BER"),
        ("pos_err", "shadow_error"),
        ("neg_err", "non_shadow_error"),
    ):
        theirs = "scalar.adapter_ber" if name == "ber" else f"scalar.adapter_ber_{name}"
        expected.equal(theirs, scores[f"{ours}_image_mean"], SINGLE)


def _adapter_metrics():
    return (
        ("sm", StructureMeasure(degenerate="zero"), "S_measure"),
        ("em", Curve("E"), "E_mean"),
        ("wfm", WeightedF(beta2=0.3), "weighted_F"),
        ("mae", MeanAbsoluteError(), "MAE"),
    )


def _check_regions(expected: Expected, pairs: Measurer, config: dict) -> None:
    smooth = Overlap(smooth=1e-3)
    for name in ("iou", "dice"):
        expected.equal(f"{name}_smooth1e-3_per_image", pairs.columns(smooth, name), SINGLE)
        expected.equal(f"scalar.{name}_smooth_mean", pairs.scores(smooth)[name], SINGLE)
    share = config["boundary_iou_ratio"]
    boundary = pairs.columns(BoundaryIoU(ratio=share), "boundary_iou")
    expected.equal(f"boundary_iou_{share}_per_image", boundary)
    thickness = boundary_thickness(tuple(config["size"]), share)
    expected.equal("scalar.boundary_iou_distance_px", thickness)


def _check_shadow(expected: Expected, truths: np.ndarray, inputs: dict) -> None:
    pairs, metric = Measurer(truths, inputs["pred"] / 255), BalancedError()
    tp, fp, fn, tn = np.array(pairs.sums(metric)).T[:4]
    expected.equal("ber_counts_tp_tn_pos_neg", np.stack([tp, tn, tp + fn, tn + fp], 1))
    scores = pairs.scores(metric)
    expected.equal("scalar.ber_pooled", scores["BER"])
    expected.equal("scalar.ber_pooled_pos_err", scores["shadow_error"])
    expected.equal("scalar.ber_pooled_neg_err", scores["non_shadow_error"])
    expected.equal("scalar.ber_image_mean_two_class_only", scores["BER_image_mean"])
    each = np.array(pairs.columns(metric, "BER"))
    two = inputs["two_class_indices"]
    expected.equal("ber_per_image_two_class_only", each[two])
    assert np.isnan(np.delete(each, two)).all()


def _check_classes(expected: Expected, inputs: dict, config: dict) -> None:
    count = config["num_classes"]
    truth = np.where(inputs["mc_gt"] == config["ignore_index"], IGNORE, inputs["mc_gt"])
    expected.equal("mc_confusion_rows_gt_cols_pred", confusion(truth, inputs["mc_pred"], count))
    metric = Classes(tuple(map(str, range(count))))
    sums = sum(
        metric.measure(t, Answer(labels=p)).sums
        for t, p in zip(truth, inputs["mc_pred"], strict=True)
    )
    scores = metric.summarise(sums)
    iou = np.array([scores[f"iou/{k}"] for k in range(count)])
    expected.equal("mc_iou_per_class_nan_if_absent", iou)
    expected.equal("scalar.mc_miou_present", scores["mIoU"])
    expected.equal("scalar.mc_torchmetrics_macro", scores["mIoU"], SINGLE)
    expected.equal("scalar.mc_pixel_acc", scores["pixel_accuracy"])
    expected.equal("scalar.mc_mean_class_acc_gt_classes", scores["class_accuracy"])
    expected.equal("scalar.mc_fw_iou", scores["fwIoU"])
    # Conventions that we do not offer: absent classes as 0, and as -1.
    expected.equal("mc_torchmetrics_none", np.nan_to_num(iou), SINGLE)
    expected.equal("scalar.mc_miou_zero_for_absent", np.nan_to_num(iou).mean())
    published = gsam_validation(sums)
    expected.equal("mc_gsam_val_iou_per_class", published, GSAM)
    expected.equal("scalar.mc_gsam_val_miou", published.mean(), GSAM)


def gsam_validation(sums: np.ndarray) -> np.ndarray:
    """G-SAM's IoU per class from our sums: its formula takes 1e-7 off the union, to the -1 of an
    absent class. Only here, to compare the counts.
    """
    right, true, predicted = np.split(sums, 3)
    smooth = 1e-7
    return (right + smooth) / (true + predicted - right - smooth)


def _check_soft(expected: Expected, inputs: dict) -> None:
    logits = torch.from_numpy(inputs["soft_logits"])
    scores = _soft_scores(logits.softmax(1).numpy(), inputs["soft_target"])
    expected.equal("scalar.gsam_test_soft_miou_one_batch_of_4", scores["soft_mIoU"], SINGLE)
    labels = logits.argmax(1).numpy()
    metric = Classes(tuple(map(str, range(logits.shape[1]))))
    sums = metric.measure(inputs["soft_target"], Answer(labels=labels)).sums
    expected.equal("scalar.hard_miou_same_batch", metric.summarise(sums)["mIoU"], SINGLE)


def _soft_scores(probability: np.ndarray, truth: np.ndarray) -> dict:
    metric = SoftClasses(tuple(map(str, range(probability.shape[1]))))
    pairs = zip(truth, probability, strict=True)
    return metric.summarise(
        sum(metric.measure(t, Answer(class_probability=p)).sums for t, p in pairs)
    )


def _check_volumes(expected: Expected, inputs: dict, config: dict) -> None:
    truths, labels = inputs["vol_gt"], inputs["vol_pred"]
    organs = expected.left["vol_samed_per_organ_mean"].shape[0]
    names = tuple(map(str, range(organs + 1)))
    for empty, each in (("published", "samed_rule_dice_hd95"), ("strict", "dice_hd95voxel_nan")):
        metric = Organs(names, empty=empty)
        measured = [
            metric.measure(t, Answer(labels=p)) for t, p in zip(truths, labels, strict=True)
        ]
        rows = np.array([list(m.columns.values()) for m in measured]).reshape(-1, 2, organs)
        expected.equal(f"vol_{each}", rows.transpose(0, 2, 1))
        sums = sum(m.sums for m in measured)
        scores = metric.summarise(sums)
        if empty == "published":
            expected.equal("vol_samed_per_organ_mean", means(sums).reshape(2, organs).T)
            expected.equal("scalar.vol_samed_mean_dice", scores["dice"])
            expected.equal("scalar.vol_samed_mean_hd95", scores["HD95"])
        else:  # theirs is one mean over all volumes and organs
            total, count = sums.reshape(2, 2, organs).sum(-1)
            expected.equal("scalar.vol_nanmean_dice", total[0] / count[0])
            expected.equal("scalar.vol_nanmean_hd95_voxel", total[1] / count[1])
    _check_millimetres(expected, truths, labels, organs, config)


def _check_millimetres(expected: Expected, truths, labels, organs: int, config: dict) -> None:
    spacing = config["volume_spacing_zyx_mm"]
    tolerance = config["surface_tolerances_mm"][1]
    rows = []
    for truth, answer in zip(truths, labels, strict=True):
        for organ in range(1, organs + 1):
            predicted, true = answer == organ, truth == organ
            if predicted.any() and true.any():
                found = surface_distances(predicted, true, spacing)
                dice = surface_dice(found, tolerance)
                rows.append([hd95(found), hd95(found, "larger"), dice])
            else:
                neither = not predicted.any() and not true.any()
                rows.append([np.nan, np.nan, np.nan if neither else 0])
    joined, larger, dice = np.array(rows).T
    expected.equal("vol_hd95_mm_medpy", joined)
    expected.equal("vol_hd95_mm_monai", larger, MONAI)
    expected.equal("vol_nsd_tol2_mm_monai", dice, MONAI)


def _check_instances(expected: Expected, inputs: dict) -> None:
    accuracy, precision = SegmentationAccuracy(), AveragePrecision()
    rows, curves, tables = [], [], []
    for true, found, by_label in zip(
        inputs["inst_gt"], inputs["inst_pred"], inputs["inst_pred_score_by_label"], strict=True
    ):
        scores = by_label[np.unique(found[found > 0])]
        answer = Answer(masks=masks_of(found), scores=scores)
        rows.append(accuracy.measure(masks_of(true), answer))
        tables.append(precision.measure(masks_of(true), answer))
        curves.append(accuracies(mask_ious(masks_of(found), masks_of(true)))[0])
    expected.equal("inst_sa_by_threshold_per_image", curves)
    scores = accuracy.summarise(sum(row.sums for row in rows))
    for theirs, ours in (
        ("msa", "mSA"), ("sa50", "SA50"), ("sa75", "SA75"), ("f1_50", "F1"),
        ("precision_50", "precision"), ("recall_50", "recall"),
    ):  # fmt: skip
        expected.equal(f"scalar.inst_{theirs}", scores[ours])
    sums, ones = np.stack([t.sums for t in tables]), np.ones((1, len(tables)))
    ranked = precision.rank([t.ranked for t in tables], sums, ones)
    for name in ("AP", "AP50", "AP75", "AR100"):
        expected.equal(f"scalar.coco_{name.lower()}", ranked[name])


def check_metrics_iou(fixture: Fixture) -> None:
    """G-SAM's IoU by classes, and its soft IoU."""
    expected, count = Expected(fixture), fixture.config["num_classes"]
    ignore = fixture.config["ignore_label"]

    def sums_of(prefix: str) -> np.ndarray:
        truth = fixture[f"input.{prefix}target"].numpy()
        labels = fixture[f"input.{prefix}logits"].argmax(1).numpy()
        metric = Classes(tuple(map(str, range(count))))
        return metric.measure(np.where(truth == ignore, IGNORE, truth), Answer(labels=labels)).sums

    metric = Classes(tuple(map(str, range(count))))
    expected.equal("iou_per_class", gsam_validation(sums_of("")), GSAM)
    expected.equal("miou", metric.summarise(sums_of(""))["mIoU"], GSAM)
    absent = gsam_validation(sums_of("absent_"))
    expected.equal("absent_iou_per_class", absent, GSAM)
    scores = metric.summarise(sums_of("absent_"))
    present = absent >= 0
    assert all(np.isnan(scores[f"iou/{k}"]) for k in np.flatnonzero(~present))
    np.testing.assert_allclose(scores["mIoU"], absent[present].mean(), rtol=GSAM)

    logits, truth = fixture["input.binary_logits"], fixture["input.binary_target"].numpy()
    pooled = PooledOverlap(threshold=np.nextafter(0.5, 0))  # theirs counts 0.5 as foreground
    answer = Answer(probability=logits.sigmoid().numpy())
    tp, fp, fn, tn = pooled.measure(truth.astype(np.uint8), answer).sums
    both = [tn / (tn + fp + fn), tp / (tp + fp + fn)]
    expected.equal("binary_iou_per_class", both, GSAM)
    scores = pooled.summarise(np.array([tp, fp, fn, tn]))
    np.testing.assert_allclose(scores["mIoU_pooled"], np.mean(both), rtol=1e-12)

    probability = fixture["input.logits"].softmax(1).numpy()
    soft = _soft_scores(probability, fixture["input.soft_target"].numpy())
    expected.equal("soft_miou", soft["soft_mIoU"], SINGLE)
    assert not expected.left, f"not checked: {sorted(expected.left)}"


def check_metrics_official(fixture: Fixture) -> None:
    """SAM-Adapter's own numbers on random float32 maps."""
    expected = Expected(fixture)
    truths = (fixture["input.mask"].numpy()[:, 0] * 255 > 128).astype(np.uint8)
    maps = fixture["input.prob"].numpy()[:, 0]
    pairs = Measurer(truths, maps)
    names = {"sm": "S_measure", "em": "E_measure_mean", "wfm": "weighted_F", "mae": "MAE"}
    for name, metric, column in _adapter_metrics():
        rows, mean = f"cod.per_image.{names[name]}", f"cod.mean.{names[name]}"
        expected.equal(rows, pairs.columns(metric, column), SINGLE)
        expected.equal(mean, pairs.scores(metric)[column], SINGLE)

    chosen = expected.left.pop("ber.images")
    metric, pairs = BalancedError(), Measurer(truths[chosen], maps[chosen])
    scores = pairs.scores(metric)
    for theirs, ours in (
        ("ber_pct", "BER"), ("shadow_error_pct", "shadow_error"),
        ("non_shadow_error_pct", "non_shadow_error"),
    ):  # fmt: skip
        expected.equal(f"ber.per_image.{theirs}", pairs.columns(metric, ours))
        expected.equal(f"ber.pooled_pixels.{theirs}", scores[ours])
    assert not expected.left, f"not checked: {sorted(expected.left)}"


CHECKS = {
    "metrics": check_metrics,
    "metrics_iou": check_metrics_iou,
    "metrics_official": check_metrics_official,
}
