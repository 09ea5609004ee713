"""The real commands as a user types them: run.sh, eval.sh, on one and on two processes."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ["code", "run.sh", "eval.sh", "setup.sh", "requirements.txt", "checkpoints/README.md"]


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A copy of what a clone holds, so that a test writes nothing into the repository."""
    copy = tmp_path_factory.mktemp("clone")
    for name in SHIPPED:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    return copy


def environment(**variables) -> dict:
    """This interpreter's environment counts as the active one; nothing of torchrun's leaks in."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "MASTER"))}
    return kept | {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"} | variables


def launch(house: Path, script: str, *flags: str, code: int = 0, **variables) -> str:
    done = subprocess.run(
        ["bash", script, *flags], cwd=house, env=environment(**variables), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=600,
    )  # fmt: skip
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}"
    assert "Traceback" not in done.stdout, done.stdout
    return done.stdout


def scores_of(house: Path, run: str) -> dict:
    return json.loads((house / run / "scores.json").read_text())


def passed_on(folder: Path, *flags: str, **variables) -> dict[str, str]:
    """What run.sh passes to the verb: flags and their values."""
    for name in ("run.sh", "setup.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "code").mkdir(exist_ok=True)
    (folder / "code/torchrun.py").write_text("import json, sys; print(json.dumps(sys.argv))")
    text = launch(folder, "run.sh", *flags, **variables)
    arguments = json.loads(text.splitlines()[-1])
    assert arguments[-len(flags) :] == [*flags] or not flags, "a typed flag comes last, and wins"
    arguments = arguments[arguments.index("train") + 1 : len(arguments) - len(flags)]
    return dict(zip(arguments[::2], arguments[1::2], strict=True))


def test_the_launchers_defaults_do_not_win_over_a_file(tmp_path):
    everything = passed_on(tmp_path, LR="0.5")
    assert everything.keys() >= {"--model_type", "--train_image_dir", "--output_dir"}
    assert everything["--lr"] == "0.5" and everything["--batch_size"] == "4"
    assert passed_on(tmp_path, "--lr", "1", LR="0.5") == everything
    assert passed_on(tmp_path, "--config", "x.yaml") == {}
    said = passed_on(tmp_path, "--config=x.yaml", "--lr", "1", EPOCH="3", TRAIN_MASK_DIR="a b")
    assert said == {"--epoch": "3", "--train_mask_dir": "a b"}


def test_the_launcher_passes_restarts_to_torchrun(tmp_path):
    for given, passed in (({}, "0"), ({"MAX_RESTARTS": "3"}, "3")):
        passed_on(tmp_path, **given)
        arguments = json.loads(launch(tmp_path, "run.sh", **given).splitlines()[-1])
        assert arguments[arguments.index("--max_restarts") + 1] == passed
        assert arguments.index("--max_restarts") < arguments.index("code/run_sa.py")


QUICK = {"EPOCH": "1", "BATCH_SIZE": "4"}


@pytest.fixture(scope="module")
def sample_run(house) -> str:
    """`./run.sh` on the sample set with two processes; a test of its own, shared by others."""
    run = "checkpoints/two"
    text = launch(house, "run.sh", NGPU="2", OUTPUT_DIR=run, **QUICK)
    for part in ("environment: ", "sample", "tuned", "zero-shot", "box-filled", run):
        assert part in text, f"{part!r} is not said:\n{text}"
    return run


def test_run_sh_trains_scores_and_leaves_its_files(house, sample_run):
    folder = house / sample_run
    for name in (
        "config.yaml", "metrics.jsonl", "curves.png", "best.safetensors", "last.pt",
        "scores.json", "scores.csv", "examples.png",
    ):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1]


def test_eval_sh_on_one_process_repeats_the_scores_of_two(house, sample_run):
    """Sharded evaluation counts every image once: one process finds the very same numbers."""
    before = scores_of(house, sample_run)
    text = launch(house, "eval.sh", "--save_predictions", RUN=sample_run, BATCH_SIZE="2")
    after = scores_of(house, sample_run)
    assert after["images"] == before["images"] == 6
    assert after["prompt"] == "box" and "box of the true mask" in text
    for model in ("tuned", "zero_shot", "box_filled"):
        for name, value in before[model].items():
            assert after[model][name] == pytest.approx(value, abs=1e-6), (model, name)
    with (house / sample_run / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    mean = sum(float(row["tuned_iou"]) for row in rows) / len(rows)
    assert mean == pytest.approx(after["tuned"]["iou"], abs=1e-5)
    drawn = house / sample_run / "predictions"
    assert len(list((drawn / "masks").iterdir())) == len(list((drawn / "overlays").iterdir())) == 6


def test_two_machines_with_one_process_each_train_what_one_with_two_does(
    house, sample_run, tmp_path
):
    """The same line on each, on a disk that they share: they draw the sample set and one run."""
    for name in SHIPPED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(house / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    machines = [
        subprocess.Popen(
            ["bash", str(tmp_path / "run.sh")], cwd=tmp_path, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment(
                NNODES="2", NODE_RANK=node, MASTER_PORT=port, OUTPUT_DIR="run", **QUICK
            ),
        )
        for node in "10"
    ]  # fmt: skip
    try:
        said = [machine.communicate(timeout=300)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "2 process(es) on cpu" in said[1] and "tuned" not in said[0], said
    ours, theirs = (
        json.loads((folder / "metrics.jsonl").read_text())
        for folder in (tmp_path / "run", house / sample_run)
    )
    for part in ("train", "validation"):
        assert ours[part] == pytest.approx(theirs[part], rel=1e-5)
    from safetensors.torch import load_file

    ours, theirs = (
        load_file(folder / "best.safetensors") for folder in (tmp_path / "run", house / sample_run)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert sorted(path.name for path in (tmp_path / "dataset").iterdir()) == ["sample"]


def test_a_folder_with_a_run_is_not_overwritten(house, sample_run):
    text = launch(house, "run.sh", code=2, OUTPUT_DIR=sample_run, NGPU="2", **QUICK)
    assert text.count("error: ") == 1 and f"--resume {sample_run}" in text


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--learning_rate", "1"], "unknown option --learning_rate"),
        (["--train_image_dir", "a", "--train_mask_dir", "b", "--val_slice", "1:"], "image_dir a"),
        (["--image_size", "100"], "--image_size 100"),
        (["--model_type", "vit_b"], "sam_vit_b_01ec64.pth"),
        (["--tune_out", "8", "--adapter", "decoder"], "belongs to --adapter sam_adapter"),
    ],
)
def test_a_mistake_is_said_once_without_traceback(house, flags, said):
    text = launch(house, "run.sh", *flags, code=2, NGPU="2")
    assert text.count("error: ") == 1 and said in text, text


def test_other_ranks_let_rank_0_speak_first(house):
    """torchrun ends rank 0 as soon as another rank has left, perhaps before it has spoken."""
    command = [sys.executable, "code/run_sa.py", "train", "--learning_rate", "1"]
    ranks = [
        subprocess.Popen(
            command, cwd=house, env=environment(RANK=rank, WORLD_SIZE="2"), text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for rank in "10"
    ]  # fmt: skip
    try:
        _, said = ranks[1].communicate(timeout=60)
        assert ranks[1].returncode == 2 and "unknown option --learning_rate" in said
        assert ranks[0].poll() is None, "rank 1 waits"
    finally:
        ranks[0].terminate()
    assert ranks[0].communicate(timeout=60)[1] == ""


def test_no_flag_is_an_abbreviation_of_torchruns():
    """torchrun would take `--run` for one of `--run-path` and `--run_path`, and refuse both."""
    from torch.distributed.run import get_args_parser

    from samtune import config

    theirs = [o for action in get_args_parser()._actions for o in action.option_strings]
    groups = [g for g in vars(config).values() if is_dataclass(g)]
    ours = {f"--{f.name}" for g in groups for f in fields(g) if f.metadata} | {"--config"}
    assert len(ours) > 50
    for flag in sorted(ours):
        longer = [option for option in theirs if option.startswith(flag) and option != flag]
        assert len(longer) < 2, f"{flag} is ambiguous to torchrun: {longer}"


def test_a_run_that_goes_on_keeps_its_adapter(tmp_path):
    """run.sh passes its default adapter; the run's own flags must still be understood."""
    import run_sa
    from samtune.config import TrainConfig

    base = tmp_path / "config.yaml"
    base.write_text("adapter: lora\nrank: 7\nmodel_type: vit_mini\n")
    argv = ["--adapter", "sam_adapter", "--epoch", "3"]
    config, parsed = run_sa.read(TrainConfig, "train", argv, str(base))
    assert (config.model.adapter, config.adapter.rank, config.run.epoch) == ("lora", 7, 3)
    assert parsed.remarks == ["--adapter sam_adapter is ignored: the run that goes on has 'lora'"]


def test_help_is_quick_and_complete(house):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "code/run_sa.py", "--help"],
        cwd=house, env=environment(), text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0 and "--tune_out" in done.stdout and "(default: " in done.stdout
    assert " torch\n" not in done.stderr


def test_a_signal_saves_and_the_next_launch_goes_on_exactly(house):
    """SIGTERM in the middle of an epoch, then --resume: the same weights as without the signal."""
    flags = ["--batch_size", "1", "--epoch", "2", "--workers", "1"]
    launch(house, "run.sh", *flags, "--output_dir", "checkpoints/whole")
    process = subprocess.Popen(
        ["bash", "run.sh", *flags, "--output_dir", "checkpoints/cut"], cwd=house,
        env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    metrics = house / "checkpoints/cut/metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and metrics.read_text().count("\n") == 1:
            break
        time.sleep(0.1)
    time.sleep(0.5)  # into the second epoch
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 75, text
    assert "Traceback" not in text and "--resume" in text
    assert metrics.read_text().count("\n") == 1, "the signal came too late to cut an epoch"
    launch(house, "run.sh", "--resume", "checkpoints/cut", "--epoch", "2", "--workers", "0")
    whole, cut = (house / "checkpoints" / name for name in ("whole", "cut"))
    assert (whole / "metrics.jsonl").read_text() != ""
    kept = [
        [
            {k: v for k, v in json.loads(line).items() if not k.endswith(("seconds", "speed"))}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (whole, cut)
    ]
    assert kept[0] == kept[1]
    from safetensors.numpy import load_file

    first, second = (load_file(folder / "best.safetensors") for folder in (whole, cut))
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_that_loses_a_process_ends_as_if_nothing_had_happened(house, rank):
    """kill -9 in the second epoch, `MAX_RESTARTS=1`, no folder named and nothing to go on with."""
    flags = ["--batch_size", "1", "--epoch", "3", "--workers", "1", "--adapter", "decoder"]
    whole, root = house / f"checkpoints/whole{rank}", house / "checkpoints"
    launch(house, "run.sh", *flags, NGPU="2", OUTPUT_DIR=str(whole))
    before = set(root.iterdir())
    process = subprocess.Popen(
        ["bash", "run.sh", *flags], cwd=house, text=True,
        env=environment(NGPU="2", MAX_RESTARTS="1"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        for _ in range(3000):
            started = set(root.iterdir()) - before
            if any((run / "last.pt").exists() for run in started):
                break
            assert process.poll() is None
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[rank]), signal.SIGKILL)
        text, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0 and "signal SIGKILL: restart 1 of 1" in text, text
    (run,) = started
    assert f"started again: checkpoints/{run.name} goes on from its last state" in text
    assert set(root.iterdir()) - before == {run}
    from safetensors.numpy import load_file

    first, second = (load_file(folder / "best.safetensors") for folder in (whole, run))
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)
    one, other = (scores_of(house, f"checkpoints/{folder.name}") for folder in (whole, run))
    assert one["tuned"] == other["tuned"]


def test_isbi_2012(house, data_dir):
    """Real data with its own names, JPEG labels and inverted polarity, split by slice number."""
    flags = [
        "--train_image_dir", str(data_dir / "isbi2012/images"),
        "--train_mask_dir", str(data_dir / "isbi2012/labels"),
        "--test_image_dir", str(data_dir / "isbi2012/images"),
        "--test_mask_dir", str(data_dir / "isbi2012/labels"),
        "--foreground", "below", "--train_slice", ":20", "--val_slice", "20:25",
        "--test_slice", "25:", "--output_dir", "checkpoints/isbi",
    ]  # fmt: skip
    text = launch(house, "run.sh", *flags, NGPU="2", EPOCH="2", BATCH_SIZE="2")
    assert "JPEG" in text
    scores = scores_of(house, "checkpoints/isbi")
    assert scores["images"] == 5
    assert scores["box_filled"]["iou"] == pytest.approx(0.22, abs=0.03)  # membrane is 22 %
