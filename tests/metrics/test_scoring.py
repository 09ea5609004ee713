"""Scoring: the same result however pictures are dealt, and what the result states."""

from __future__ import annotations

import json
import pickle
import random

import numpy as np
import pytest

from samtune.errors import UserError
from samtune.metrics.measure import Answer
from samtune.metrics.protocols import PROTOCOLS, SQUARE, choose, lower_is_better
from samtune.metrics.scoring import METRICS, OWN_COLUMNS, Scoring, nearest
from samtune.structures import IGNORE

CLASSES = 4
MODES = [(name, mode) for name, row in PROTOCOLS.items() for mode in row.modes]


def scoring_of(protocol: str, mode: str = "", **keywords) -> Scoring:
    classes = CLASSES if PROTOCOLS[protocol].classes > 1 else 1
    return Scoring(protocol, classes, mode=mode, replicates=50, **keywords)


def picture(form: str, seed: int, side: int = 24) -> tuple[np.ndarray, Answer]:
    """A truth and an answer that is right more often than not; no two sizes need be equal."""
    rng = np.random.default_rng(seed)
    size = (side, side + seed % 3)
    if form == "instances":
        masks = rng.random((3, *size)) < 0.2
        noise = rng.random((3, *size)) < 0.05
        return masks, Answer(masks=masks ^ noise, scores=rng.random(3))
    if form == "probability":
        truth = (rng.random(size) < 0.3).astype(np.uint8)
        grey = 0.6 * truth + 0.4 * rng.random(size)
        truth[0, : seed % 5] = IGNORE
        return truth, Answer(probability=grey.astype(np.float32))
    truth = rng.integers(0, CLASSES, size, dtype=np.uint8)
    labels = np.where(rng.random(size) < 0.7, truth, rng.integers(0, CLASSES, size))
    chances = np.eye(CLASSES, dtype=np.float32)[labels].transpose(2, 0, 1)
    truth[0, : seed % 5] = IGNORE
    return truth, Answer(labels=labels.astype(np.uint8), class_probability=chances)


def fill(scoring: Scoring, seeds) -> Scoring:
    """Pictures by seed; of volumes, three slices each."""
    form, volumes = scoring.protocol.answer, scoring.protocol.unit == "volume"
    for seed in seeds:
        if volumes:
            for k in range(3):
                truth, answer = picture(form, 10 * seed, 16)
                scoring.add(f"case{seed}_slice{k}", np.roll(truth, k, 0), answer, f"case{seed}")
        else:
            scoring.add(f"picture{seed}", *picture(form, seed))
    return scoring


@pytest.mark.parametrize(("protocol", "mode"), MODES)
def test_the_result_does_not_depend_on_how_pictures_were_dealt(protocol, mode):
    whole = fill(scoring_of(protocol, mode), range(9))
    shuffled = list(range(9))
    random.Random(1).shuffle(shuffled)
    shards = [fill(scoring_of(protocol, mode), shuffled[k::3]) for k in range(3)]
    shards = [pickle.loads(pickle.dumps(shard)) for shard in shards]
    merged = shards[2].merge([shards[0], shards[1], scoring_of(protocol, mode)])
    assert merged.result() == whole.result()
    assert merged.table() == whole.table()


@pytest.mark.parametrize(("protocol", "mode"), MODES)
def test_a_result_is_json_and_holds_every_headline(protocol, mode):
    scoring = fill(scoring_of(protocol, mode), range(4))
    result = scoring.result()
    assert json.loads(json.dumps(result, allow_nan=False)) == json.loads(json.dumps(result))
    assert tuple(result["headlines"]) == scoring.mode.headlines
    for name, headline in result["headlines"].items():
        low, high = headline["interval"]
        assert low <= high and headline["value"] == result["scores"][name]
        assert headline["better"] == ("lower" if lower_is_better(name) else "higher")
    counted = result["counts"][f"{scoring.protocol.unit}s"]
    assert counted == len(scoring.table()) == 4
    assert {row["metric"] for row in result["policy"]} == {m for m, _ in scoring.mode.metrics}
    assert tuple(scoring.table()[0])[: len(OWN_COLUMNS)] == OWN_COLUMNS


@pytest.mark.parametrize(("protocol", "mode"), MODES)
def test_nothing_scored_is_undefined_and_without_an_interval(protocol, mode):
    result = scoring_of(protocol, mode).result()
    for headline in result["headlines"].values():
        assert headline["value"] is None and headline["interval"] is None


@pytest.mark.parametrize("protocol", [name for name in PROTOCOLS if name != "instances"])
def test_a_picture_that_says_nothing_changes_no_score(protocol):
    scoring = fill(scoring_of(protocol), range(3))
    truth, answer = picture(scoring.protocol.answer, 3)
    scoring.add("unread", np.full_like(truth, IGNORE), answer, "unread")
    result, before = scoring.result(), fill(scoring_of(protocol), range(3)).result()
    assert result["scores"] == before["scores"]
    ignored = result["counts"]["ignored_pixels"] - before["counts"]["ignored_pixels"]
    assert ignored == truth.size
    assert result["counts"]["empty_truths"] == before["counts"]["empty_truths"] + 1


def test_only_rows_grow():
    sizes = []
    scoring = scoring_of("cod")
    for start in (0, 20):
        fill(scoring, range(start, start + 20))
        sizes.append(len(pickle.dumps(scoring)))
    assert (sizes[1] - sizes[0]) / 20 < 24 * 24  # bytes: less than one mask


def test_a_complete_volume_lets_its_slices_go():
    scoring = fill(scoring_of("synapse"), [1])
    assert not scoring.table() and len(scoring.open["case1"]) == 3
    scoring.complete("case1")
    assert not scoring.open and [row["id"] for row in scoring.table()] == ["case1"]
    with pytest.raises(ValueError, match="after its volume"):
        fill(scoring, [1])


def test_slices_are_stacked_by_number_and_may_come_from_several_processes():
    truth = np.zeros((12, 8, 8), np.uint8)
    truth[2:11, 2:6, 2:6] = 1
    answer = np.roll(truth, 1, 0)

    def scored(order, shards: int) -> dict:
        parts = [scoring_of("synapse", "strict") for _ in range(shards)]
        for k in order:
            parts[k % shards].add(f"case_{k}", truth[k], Answer(labels=answer[k]), "case")
        return parts[0].merge(parts[1:]).result()

    expected = scored(range(12), 1)
    assert expected["scores"]["HD95/1"] == 1
    assert scored(reversed(range(12)), 1) == scored(range(12), 3) == expected


def test_pictures_of_one_group_are_drawn_together():
    alone, grouped = scoring_of("binary"), scoring_of("binary")
    for seed in range(8):
        alone.add(f"{seed}", *picture("probability", seed))
        grouped.add(f"{seed}", *picture("probability", seed), group="video")
    assert grouped.result()["scores"] == alone.result()["scores"]
    assert alone.result()["headlines"]["iou"]["interval"] is not None
    assert grouped.result()["headlines"]["iou"]["interval"] is None
    assert grouped.result()["bootstrap"]["draws"] == 1


def test_a_picture_counts_once():
    scoring = fill(scoring_of("shadow"), [1])
    with pytest.raises(ValueError, match="scored twice"):
        fill(scoring, [1])
    with pytest.raises(ValueError, match="scored twice"):
        scoring.merge([fill(scoring_of("shadow"), [1])])


def test_undefined_values_are_counted():
    scoring = scoring_of("shadow")
    for seed, truth in enumerate([np.zeros((4, 4), np.uint8), np.eye(4, dtype=np.uint8)]):
        scoring.add(f"{seed}", truth, Answer(probability=truth.astype(np.float32)))
    counts = scoring.result()["counts"]
    assert counts["empty_truths"] == 1 and counts["undefined"]["BER"] == 1


def test_an_answer_must_fit_the_truth_and_the_protocol():
    truth, answer = picture("probability", 0)
    with pytest.raises(ValueError, match="not as large"):
        scoring_of("binary").add("a", truth[1:], answer)
    with pytest.raises(ValueError, match="scores labels"):
        scoring_of("semantic").add("a", truth, answer)


def test_a_protocol_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="did you mean shadow"):
        choose("shadows")
    with pytest.raises(UserError, match="choose from"):
        choose("cod", "official")
    with pytest.raises(UserError, match="one foreground class and --num_classes is 11"):
        choose("cod", num_classes=11)
    with pytest.raises(UserError, match="two classes or more"):
        choose("semantic")
    with pytest.raises(UserError, match="give each class its own"):
        Scoring("semantic", 3, ("road", "car", "car"))


def test_the_table_is_consistent():
    for name, row in PROTOCOLS.items():
        for mode_name, mode in row.modes.items():
            scoring = scoring_of(name, mode_name)
            assert all(kind in METRICS for kind, _ in mode.metrics)
            columns = [column for metric in scoring.metrics for column in metric.columns]
            assert len(set(columns)) == len(columns)
            assert set(mode.headlines) <= set(scoring.result()["scores"])
    assert choose("cod", "adapter")[2].resolution == SQUARE
    assert lower_is_better("HD95/spleen") and not lower_is_better("mIoU")


def test_class_names_name_the_scores():
    scoring = Scoring("semantic", 2, ("road", "car"), replicates=2)
    truth = np.array([[0, 0, 1, 1]], np.uint8)
    scoring.add("a", truth, Answer(labels=np.array([[0, 0, 0, 1]])))
    scores = scoring.result()["scores"]
    assert scores["iou/road"] == pytest.approx(2 / 3) and scores["iou/car"] == 0.5
    assert scores["accuracy/car"] == 0.5 and scores["class_accuracy"] == 0.75


def test_settings_reach_the_metric_and_the_record():
    scoring = scoring_of("synapse", settings={"Organs": {"spacing": (5.0, 1.0, 1.0)}})
    assert scoring.result()["policy"][0]["spacing"] == (5.0, 1.0, 1.0)


@pytest.mark.parametrize("size", [(3, 5), (8, 12), (17, 11), (40, 33)])
def test_nearest_is_that_of_pillow(size):
    from PIL import Image

    truth = np.random.default_rng(0).integers(0, 9, (12, 17), dtype=np.uint8)
    resized = Image.fromarray(truth).resize(size[::-1], Image.Resampling.NEAREST)
    np.testing.assert_array_equal(nearest(truth, size), np.asarray(resized))
