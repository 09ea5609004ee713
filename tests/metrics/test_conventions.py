"""What each metric says where the definition says little: empty, full, tiny and unread."""

from __future__ import annotations

import numpy as np
import pytest

from samtune.metrics.curves import Curve
from samtune.metrics.instances import AveragePrecision, SegmentationAccuracy, mask_ious, masks_of
from samtune.metrics.measure import Answer
from samtune.metrics.overlap import Overlap, PooledOverlap
from samtune.metrics.saliency import MeanAbsoluteError, StructureMeasure, WeightedF
from samtune.metrics.semantic import Classes, SoftClasses, confusion
from samtune.metrics.shadow import BalancedError
from samtune.metrics.surface import BoundaryIoU, hd95, surface_dice, surface_distances
from samtune.metrics.volumes import Organs
from samtune.structures import IGNORE

EMPTY, FULL = np.zeros((16, 20), np.uint8), np.ones((16, 20), np.uint8)
HALF = np.zeros((16, 20), np.uint8)
HALF[:, :10] = 1
BINARY = [
    Overlap(), Overlap(smooth=1e-3), PooledOverlap(), BoundaryIoU(), StructureMeasure(),
    WeightedF(), MeanAbsoluteError(), Curve("E"), Curve("F"), Curve("dice"), BalancedError(),
]  # fmt: skip


def column(metric, truth, answer, name):
    answer = Answer(probability=np.asarray(answer, np.float32))
    return metric.measure(truth, answer).columns[name]


@pytest.mark.parametrize(
    ("metric", "name", "both", "only_answer", "only_truth"),
    [
        (Overlap(), "iou", 1, 0, 0),
        (Overlap(), "dice", 1, 0, 0),
        (Overlap(both_empty=0.0), "iou", 0, 0, 0),
        (Overlap(smooth=1e-3), "iou", 1, 1e-3 / 160.001, 1e-3 / 160.001),
        (BoundaryIoU(), "boundary_iou", np.nan, 0, 0),
        (StructureMeasure(), "S_measure", 1, 0.5, 0.375),
        (MeanAbsoluteError(), "MAE", 0, 0.5, 0.5),
        (Curve("iou"), "iou_binary", 0, 0, 0),
        (BalancedError(), "BER", np.nan, np.nan, 50),
    ],
)
def test_empty_masks(metric, name, both, only_answer, only_truth):
    for truth, answer, expected in (
        (EMPTY, EMPTY, both), (EMPTY, HALF, only_answer), (HALF, EMPTY, only_truth),
    ):  # fmt: skip
        found = column(metric, truth, answer, name)
        np.testing.assert_allclose(found, expected, atol=1e-6, equal_nan=True)


def test_weighted_f_of_nothing_to_find_and_of_nothing_found_is_zero():
    inside = np.pad(np.ones((4, 4), np.uint8), ((6, 6), (8, 8)))  # at the edge it would be more
    for truth, answer in ((EMPTY, EMPTY), (EMPTY, HALF), (inside, EMPTY)):
        assert column(WeightedF(), truth, answer, "weighted_F") == pytest.approx(0, abs=1e-12)


def test_smoothed_overlap_is_that_of_training():
    """The score that is watched during training and the one that is reported are one."""
    from torch import tensor

    from samtune.metrics.region import overlap

    rng = np.random.default_rng(0)
    truth, answer = rng.random((2, 16, 20)) < 0.4
    both, total = (truth & answer).sum(), truth.sum() + answer.sum()
    for name, expected in overlap(tensor([both]), tensor([total])).items():
        found = column(Overlap(smooth=1e-3), truth.astype(np.uint8), answer, name)
        assert found == pytest.approx(expected.item(), abs=1e-15)


def test_a_perfect_answer_scores_the_best():
    for metric, name, best in (
        (Overlap(), "iou", 1), (BoundaryIoU(), "boundary_iou", 1), (WeightedF(), "weighted_F", 1),
        (StructureMeasure(), "S_measure", 1), (MeanAbsoluteError(), "MAE", 0),
        (Curve("F"), "F_adaptive", 1), (Curve("E"), "E_adaptive", 320 / 319),
        (BalancedError(), "BER", 0),
    ):  # fmt: skip
        assert column(metric, HALF, HALF, name) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("metric", BINARY, ids=lambda metric: type(metric).__name__)
def test_unread_pixels_are_as_if_they_were_not_there(metric):
    """Unread columns beside the picture: the sums of the picture without them."""
    rng = np.random.default_rng(2)
    truth, grey = (rng.random((16, 20)) < 0.4).astype(np.uint8), rng.random((16, 20))
    alone = metric.measure(truth, Answer(probability=grey))
    beside = np.full((16, 6), IGNORE, np.uint8)
    padded = np.concatenate([truth, beside], 1)
    for noise in (np.zeros((16, 6)), np.full((16, 6), 2.0)):
        answer = Answer(probability=np.concatenate([grey, noise], 1))
        if isinstance(metric, BoundaryIoU):  # its thickness follows the picture's size
            assert np.hypot(16, 26) * 0.02 < 1.5
        np.testing.assert_allclose(metric.measure(padded, answer).sums, alone.sums, rtol=1e-12)


@pytest.mark.parametrize("metric", BINARY, ids=lambda metric: type(metric).__name__)
def test_sums_of_pictures_make_the_score_of_the_set(metric):
    rng = np.random.default_rng(4)
    pairs = [((rng.random((9, 11)) < 0.4).astype(np.uint8), rng.random((9, 11))) for _ in range(5)]
    sums = np.stack([metric.measure(t, Answer(probability=p)).sums for t, p in pairs])
    assert sums.shape == (5, metric.size)
    one = metric.summarise(sums.sum(0))
    weighted = np.ones((3, 5)) @ sums
    for name, values in metric.summarise(weighted).items():
        np.testing.assert_allclose(values, np.repeat(one[name], 3), rtol=1e-12)


def test_inputs_are_left_alone():
    truth, grey = HALF.copy(), np.linspace(0, 1, HALF.size).reshape(HALF.shape)
    for metric in BINARY:
        before = grey.copy()
        metric.measure(truth, Answer(probability=grey))
        assert (truth == HALF).all() and (grey == before).all()


def test_an_object_in_the_corner_leaves_the_structure_measure_defined():
    truth = EMPTY.copy()
    truth[-1, -1] = 1
    grey = np.random.default_rng(0).random(truth.shape)
    assert 0 <= column(StructureMeasure(), truth, grey, "S_measure") <= 1
    assert np.isnan(column(StructureMeasure(degenerate="nan"), truth, grey, "S_measure"))
    assert column(StructureMeasure(degenerate="zero"), truth, grey, "S_measure") == 0


def test_a_constant_map_is_not_stretched():
    assert column(MeanAbsoluteError(), EMPTY, np.full(EMPTY.shape, 0.25), "MAE") == 0.25
    faint = 0.1 + 0.1 * HALF
    assert column(MeanAbsoluteError(), HALF, faint, "MAE") == pytest.approx(0)
    assert column(MeanAbsoluteError(stretch=False), HALF, faint, "MAE") == pytest.approx(0.45)


def test_pooled_and_averaged_balanced_error_differ():
    metric, small = BalancedError(), EMPTY.copy()
    small[0, 0] = 1
    sums = sum(
        metric.measure(truth, Answer(probability=answer.astype(np.float32))).sums
        for truth, answer in ((HALF, HALF), (small, EMPTY), (EMPTY, EMPTY))
    )
    scores = metric.summarise(sums)
    assert scores["BER"] == pytest.approx(50 / 161) and scores["BER_image_mean"] == 25


def test_the_shadow_threshold_is_above_125_of_255():
    metric, truth = BalancedError(), np.array([[1, 1, 0, 0]], np.uint8)
    for kind in (np.float32, np.float64):
        grey = np.array([[126, 125, 126, 125]]).astype(kind) / kind(255)
        assert metric.measure(truth, Answer(probability=grey)).sums[:4].tolist() == [1, 1, 1, 1]


def test_classes_that_appear_nowhere_are_left_out():
    metric = Classes(("a", "b", "c"))
    truth = np.array([[0, 0, 0, IGNORE]], np.uint8)
    measured = metric.measure(truth, Answer(labels=np.array([[0, 0, 1, 2]])))
    scores = metric.summarise(measured.sums)
    assert scores["iou/a"] == pytest.approx(2 / 3) and scores["iou/b"] == 0
    assert np.isnan(scores["iou/c"]) and np.isnan(scores["accuracy/b"])
    assert scores["mIoU"] == pytest.approx(1 / 3)  # a, and b which was only predicted
    assert scores["class_accuracy"] == pytest.approx(2 / 3)


def test_class_ids_beyond_the_classes_are_refused():
    with pytest.raises(ValueError, match=r"the truth has class ids outside 0\.\.1"):
        confusion(np.array([0, 2]), np.array([0, 1]), 2)
    with pytest.raises(ValueError, match="the answer has class ids"):
        confusion(np.array([0, 1]), np.array([0, 3]), 2)


def test_soft_iou_of_certain_answers_is_the_hard_one():
    truth = np.random.default_rng(0).integers(0, 3, (8, 8))
    labels = np.random.default_rng(1).integers(0, 3, (8, 8))
    soft = SoftClasses(("a", "b", "c")).measure(
        truth, Answer(class_probability=np.eye(3)[labels].transpose(2, 0, 1))
    )
    hard = Classes(("a", "b", "c")).measure(truth, Answer(labels=labels))
    assert soft.columns["soft_mIoU"] == pytest.approx(hard.columns["mIoU"])


@pytest.mark.parametrize(
    ("empty", "neither", "hallucinated", "missed"),
    [
        ("published", (0, 0), (1, 0), (0, 0)),
        ("strict", (np.nan, np.nan), (0, np.nan), (0, np.nan)),
    ],
)
def test_organs_that_are_not_there(empty, neither, hallucinated, missed):
    nothing, cube = np.zeros((4, 8, 8), bool), np.zeros((4, 8, 8), bool)
    cube[1:3, 2:6, 2:6] = True
    metric = Organs(("background", "liver"), empty=empty)
    assert metric.score(nothing, nothing) == pytest.approx(neither, nan_ok=True)
    assert metric.score(cube, nothing) == pytest.approx(hallucinated, nan_ok=True)
    assert metric.score(nothing, cube) == pytest.approx(missed, nan_ok=True)
    assert metric.score(cube, cube) == (1, 0)
    penalised = Organs(("background", "liver"), hd95_penalty=50.0)
    assert penalised.score(nothing, cube) == (0, 50)


def test_distances_are_in_the_unit_of_the_spacing():
    one, other = np.zeros((9, 9, 9), bool), np.zeros((9, 9, 9), bool)
    one[2:5, 2:5, 2:5] = other[4:7, 2:5, 2:5] = True
    for spacing, farthest in ((None, 2), ((2.5, 1, 1), 5)):
        distances = surface_distances(one, other, spacing)
        assert hd95(distances) == hd95(distances, "larger") == farthest
        assert surface_dice(distances, farthest) == 1
        assert surface_dice(distances, 0) < 1
    with pytest.raises(ValueError, match="no border"):
        surface_distances(one, np.zeros_like(one))


def test_the_thick_border_is_what_erosion_takes_away():
    from scipy import ndimage

    rng = np.random.default_rng(0)
    blobs = ndimage.gaussian_filter(rng.normal(size=(2, 60, 80)), (0, 4, 4)) > 0
    metric = BoundaryIoU(ratio=0.04)  # 4 pixels
    borders = [
        mask & ~ndimage.binary_erosion(np.pad(mask, 1), np.ones((3, 3)), 4)[1:-1, 1:-1]
        for mask in blobs
    ]
    expected = (borders[0] & borders[1]).sum() / (borders[0] | borders[1]).sum()
    found = column(metric, blobs[0].astype(np.uint8), blobs[1], "boundary_iou")
    assert found == pytest.approx(expected)


def test_objects_that_are_not_there():
    none, one = np.zeros((0, 6, 6), bool), np.ones((1, 6, 6), bool)
    metric = SegmentationAccuracy()

    def scores(truth, masks):
        return metric.values(truth, Answer(masks=masks, scores=np.ones(len(masks))))

    assert set(scores(none, none).values()) == {1}
    assert set(scores(none, one).values()) == set(scores(one, none).values()) == {0}
    assert set(scores(one, one).values()) == {1}


def test_objects_are_matched_one_to_one():
    """Two answers on one object: one is right, one is wrong."""
    truth = np.zeros((1, 10, 10), bool)
    truth[0, :5] = True
    answer = Answer(masks=np.concatenate([truth, truth]), scores=np.array([0.9, 0.8]))
    scores = SegmentationAccuracy().values(truth, answer)
    assert scores["SA50"] == 0.5 and scores["precision"] == 0.5 and scores["recall"] == 1
    metric = AveragePrecision()
    measured = metric.measure(truth, answer)
    assert measured.ranked[:, 1:].sum(1).tolist() == [10, 0]
    ranked = metric.rank([measured.ranked], measured.sums[None], np.ones((1, 1)))
    assert ranked["AP"] == pytest.approx(1)


def test_average_precision_ranks_over_pictures():
    """A wrong object that scores higher, in another picture, lowers the precision of all."""
    metric, truth = AveragePrecision(), np.ones((1, 4, 4), bool)
    right = metric.measure(truth, Answer(masks=truth, scores=np.array([0.5])))
    wrong = metric.measure(truth[:0], Answer(masks=truth, scores=np.array([0.9])))
    weights = np.array([[1, 1], [1, 0], [0, 1], [2, 1]])
    sums = np.stack([right.sums, wrong.sums])
    ranked = metric.rank([right.ranked, wrong.ranked], sums, weights)
    np.testing.assert_allclose(ranked["AP"], [0.5, 1, np.nan, 2 / 3], rtol=1e-9)


def test_masks_of_a_label_image():
    ids = np.array([[0, 3, 3], [7, IGNORE, 0]], np.uint8)
    masks = masks_of(ids)
    assert masks.sum((1, 2)).tolist() == [2, 1]
    assert len(masks_of(ids.astype(np.int32))) == 3  # only in uint8 is 255 no object
    np.testing.assert_array_equal(mask_ious(masks, masks), np.eye(2))
