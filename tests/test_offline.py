"""Nothing needs a network: train, score and log where there is none."""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import network_guard
import run_sa
import without_network
from forked_ranks import free_port

ROOT = Path(__file__).resolve().parents[1]
KEY = "0123456789abcdef" * 3  # the shape of a key, and none


def in_a_fork(work, *arguments, timeout: float = 200):
    """`work(*arguments)` in a fork of this process; what it returns."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(work(*arguments)))
    child.start()
    try:
        while child.is_alive() and timeout > 0 and not receiver.poll(0.1):
            timeout -= 0.1
        assert receiver.poll(), "the fork has ended, or hangs, and has said nothing"
        return receiver.recv()
    finally:
        child.kill()


def entered() -> str:
    """Enter a namespace; why that failed, or empty."""
    network_guard.lift()
    try:
        without_network.enter()
    except (OSError, AttributeError) as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def namespace():
    if why := in_a_fork(entered):
        pytest.skip(f"{without_network.FORBIDDEN} ({why})")


# --- the guard of this suite ---------------------------------------------------------------------


def test_a_test_that_asks_for_the_network_is_told_and_remembered():
    with pytest.raises(ConnectionRefusedError, match="no network"):
        socket.create_connection(("192.0.2.1", 80), 1)
    with pytest.raises(ConnectionRefusedError):
        socket.getaddrinfo("example.org", 80)
    assert len(network_guard.refused) == 2
    network_guard.refused.clear()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        socket.create_connection(server.getsockname()).close()
    assert not network_guard.refused


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True), ("127.0.0.1", True), ("::1", True), (None, True), (b"127.3.2.1", True),
        ("0.0.0.0", True), ("example.org", False), ("192.168.0.1", False), ("fe80::1%eth0", False),
    ],
)  # fmt: skip
def test_what_is_this_machine(host, local):
    assert network_guard.is_local(host) is local


# --- who may ask ---------------------------------------------------------------------------------


def test_only_downloads_and_wandb_know_the_network():
    """Both only when asked: --download, --wandb. fsspec reads what a flag names."""
    network = ("urllib.request", "requests", "http", "socket", "huggingface_hub", "torch.hub")
    found = set()
    for path in (ROOT / "code").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.keyword):
                assert node.arg != "pretrained", f"{path}:{node.lineno}: timm would download"
            if any(n == m or n.startswith(m + ".") for n in names for m in network):
                found.add(path.relative_to(ROOT / "code/samtune").as_posix())
    assert found == {"models/weights.py", "engine/wandb_run.py"}


def imported_anew(quiet: bool) -> list[str]:
    """What albumentations asks for when it is imported."""
    from samtune.data.transforms import prepare

    for name in [n for n in sys.modules if n.split(".")[0] == "albumentations"]:
        del sys.modules[name]
    os.environ.pop("NO_ALBUMENTATIONS_UPDATE", None)
    network_guard.refused.clear()
    if quiet:
        prepare.cache_clear()
        prepare("standard")
    else:
        __import__("albumentations")
    return network_guard.refused


def test_albumentations_does_not_look_for_updates():
    assert in_a_fork(imported_anew, True) == []
    assert in_a_fork(imported_anew, False) != [], "it no longer does by itself: drop the variable"


# --- the real verbs, without any network ---------------------------------------------------------


def rank_of_a_run(rank: int, world: int, port: int, argv: list[str]) -> None:
    """One rank as torchrun starts it; what it says goes to a file."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    with (
        open(f"{argv[0]}{rank}", "w", buffering=1) as said,
        redirect_stdout(said),
        redirect_stderr(said),
    ):
        code = run_sa.main(argv)
    os._exit(code)


def launched(world: int, *argv: str) -> list[int]:
    """Exit codes of all ranks."""
    context, port = multiprocessing.get_context("fork"), free_port()
    ranks = [
        context.Process(target=rank_of_a_run, args=(rank, world, port, list(argv)))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(500)
        rank.kill()
    return [rank.exitcode for rank in ranks]


def trained_and_scored(folder: Path) -> list[int]:
    """In a namespace, with a key for W&B: two ranks train and score, one scores again."""
    assert not entered()
    os.chdir(folder)
    for name in [n for n in os.environ if n.startswith("WANDB") or n == "NETRC"]:
        del os.environ[name]
    os.environ |= {"HOME": str(folder), "WANDB_API_KEY": KEY}
    codes = launched(
        2, "train", "--image_size", "64", "--epoch", "1", "--batch_size", "4", "--workers", "1",
        "--output_dir", "run", "--wandb", "yes", "--log_every", "1",
    )  # fmt: skip
    (folder / "run/scores.json").rename(folder / "first.json")
    return codes + launched(1, "evaluate", "--run_dir", "run", "--workers", "0")


def test_without_a_network_two_processes_train_score_and_keep_what_wandb_missed(
    namespace, tmp_path
):
    pytest.importorskip("wandb")
    codes = in_a_fork(trained_and_scored, tmp_path, timeout=1500)
    said = (tmp_path / "train0").read_text()
    assert codes == [0, 0, 0], said + (tmp_path / "train1").read_text()
    assert said.count("warning: Weights & Biases: ") == 1 and "does not answer" in said
    assert "wandb sync" in said and KEY not in said
    records = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [r.get("kind", "epoch") for r in records] == ["step"] * 3 + ["epoch"]
    first, again = (
        json.loads((tmp_path / name).read_text()) for name in ("first.json", "run/scores.json")
    )
    assert first["images"] == again["images"] == 6
    assert again["tuned"] == pytest.approx(first["tuned"], abs=1e-6)
    (kept,) = (tmp_path / "run").rglob("offline-run-*/*.wandb")
    for name in (b"Validation IoU Metric", b"Step/gradient_norm"):
        assert name in kept.read_bytes(), name


@pytest.mark.slow
def test_run_sh_and_eval_sh_without_a_network(namespace, tmp_path):
    """The launchers as a user types them, torchrun's meeting on the loopback included."""
    for name in ("code", "run.sh", "eval.sh", "setup.sh", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    variables = {"VIRTUAL_ENV": sys.prefix, "NGPU": "2", "EPOCH": "1", "OUTPUT_DIR": "run"}
    for script, more in (("run.sh", {}), ("eval.sh", {"RUN": "run"})):
        done = subprocess.run(
            [sys.executable, without_network.__file__, "bash", script], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
            env=os.environ | variables | more,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        assert "zero-shot" in done.stdout
