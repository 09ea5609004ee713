"""benchmarks/scale.py: times that can be worked out by hand, and what binds."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    module = sys.modules["scale"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scale"]


LINE = {
    "images_per_second": 40.0, "processes": 2, "batch_size": 4, "accumulate": 2,
    "trainable_parameters": 1000, "total_parameters": 10_000,
}  # fmt: skip
CLUSTER = {
    "images": 1000, "gpus": 10, "loader_rate": 5, "cores_per_gpu": 8, "bytes_per_image": 100,
    "storage": 1e5, "network": 720, "write": 1600,
}  # fmt: skip


def step_of(scale, folder: Path, **changes):
    (folder / "step.json").write_text("a warning\n" + json.dumps(LINE | changes) + "\n")
    return scale.Step.read(folder / "step.json")


def test_each_resource_by_hand(scale, tmp_path):
    """10 GPUs with 8 images a step: 13 steps for 1000 images, the last one padded."""
    step, cluster = step_of(scale, tmp_path), scale.Cluster(**CLUSTER)
    assert step.rate == 20 and step.images == 8
    assert scale.seconds_per_epoch(step, cluster) == pytest.approx(
        {
            "GPUs": 13 * 8 / 20,
            "loader": 1000 / (10 * 8 * 5),
            "storage": 1.0,
            "network": 13 * 0.9 * 8000 / 720,
            "checkpoint": 16_000 / 1600,
        }
    )


def test_shards_gather_all_parameters_and_sum_gradients_once(scale, tmp_path):
    step = step_of(scale, tmp_path, shard=True)
    per_step = 2 * 8 * 10_000 + 4 * 1000  # two micro-batches gather parameters twice each
    assert scale.traffic(step, 10) == pytest.approx(0.9 * per_step)
    assert scale.traffic(step, 1) == 0  # one GPU has nobody to talk to


@pytest.mark.parametrize(
    "binding, change",
    [
        ("network", {}),
        ("GPUs", {"network": 1e9}),
        ("loader", {"network": 1e9, "loader_rate": 1}),
        ("storage", {"network": 1e9, "storage": 1e3}),
    ],
)
def test_the_slowest_binds(scale, tmp_path, binding, change):
    step = step_of(scale, tmp_path)
    cluster = replace(scale.Cluster(**CLUSTER), **change)
    seconds = scale.seconds_per_epoch(step, cluster)
    text = scale.table(step, cluster)
    (row,) = [line for line in text.splitlines() if "binds" in line]
    assert row.startswith(f"| {binding} |")
    epoch = seconds[binding] + seconds["checkpoint"]
    assert f"| **epoch**, all at once | {epoch:,.1f} |" in text


def test_what_is_not_measured_is_said_and_how_high_it_must_be(scale, tmp_path):
    """13 steps of 8 images at 20/s keep the GPUs busy for 5.2 s."""
    step = step_of(scale, tmp_path)
    cluster = replace(scale.Cluster(**CLUSTER), network=None, loader_rate=None, write=None)
    assert scale.seconds_per_epoch(step, cluster)["network"] is None
    text = scale.table(step, cluster)
    assert "| loader | not measured |  | 2.4 images/s a core |" in text  # 1000 / 10 / 8 / 5.2
    assert "| network | not measured |" in text and "not hidden" not in text
    assert "| **epoch**, all at once | 5.2 |" in text
    least = {"loader_rate": 1000 / 10 / 8 / 5.2, "storage": 1e5 / 5.2, "network": 13 * 7200 / 5.2}
    enough = scale.seconds_per_epoch(step, replace(cluster, **least))
    assert [enough[name] for name in scale.BESIDE] == pytest.approx([5.2] * 3)


def test_more_gpus_do_not_make_the_storage_faster(scale, tmp_path):
    step, few = step_of(scale, tmp_path), scale.Cluster(**CLUSTER)
    many = replace(few, gpus=20)
    before, after = (scale.seconds_per_epoch(step, cluster) for cluster in (few, many))
    assert after["storage"] == before["storage"] and after["loader"] == before["loader"] / 2


def test_the_command_prints_the_table_or_says_what_is_wrong(scale, tmp_path, capsys):
    step_of(scale, tmp_path)
    flags = [word for name, value in CLUSTER.items() for word in (f"--{name}", str(value))]
    assert scale.main([str(tmp_path / "step.json"), *flags]) == 0
    assert "| network |" in capsys.readouterr().out
    assert scale.main([str(tmp_path / "step.json"), *flags, "--storage", "0"]) == 2
    assert "--storage must be positive" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert scale.main([str(tmp_path / "other.json"), *flags]) == 2
    assert "other.json: its last line is not" in capsys.readouterr().err


def test_the_page_names_every_input(scale):
    page = (ROOT / "docs/scale.md").read_text()
    for name in scale.Cluster.__dataclass_fields__:
        assert f"--{name}" in page
