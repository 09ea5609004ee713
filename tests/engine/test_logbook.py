"""What a run tells: console, metrics.jsonl, curves, and a W&B that never asks, waits or breaks."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pty
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from samtune.config import LogOptions
from samtune.engine import logbook as logbook_module
from samtune.engine import wandb_run
from samtune.engine.distributed import Process
from samtune.engine.logbook import Logbook, Progress, draw_curves, parameter_summary

MAIN = Process(0, 1, 0, torch.device("cpu"))
OTHER = Process(1, 2, 1, torch.device("cpu"))
KEY = "0123456789abcdef" * 3  # the shape of a key, and none
PARENTS_NAMES = [
    f"{split} {name}"
    for split in ("Train", "Validation")
    for name in ("BCE Loss", "IoU Loss", "Dice Metric", "IoU Metric")
]


def record(epoch, best=False, **validation):
    scores = {"loss": 2 / epoch, "bce": 1 / epoch, "iou_loss": 1 / epoch, "iou": 0.5, "dice": 0.6}
    return {
        "epoch": epoch, "lr": 1e-4 / epoch, "train": scores, "validation": scores | validation,
        "best": best,
    }  # fmt: skip


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def no_wandb_environment(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith("WANDB") or n == "NETRC"]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


# --- metrics.jsonl and console -------------------------------------------------------------------


def test_every_epoch_is_a_line_that_is_on_disk_at_once(tmp_path, monkeypatch, capsys):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(handle))
    logbook = Logbook(tmp_path, MAIN, LogOptions(), {"prompt": "box", "epoch": 2})
    for epoch in (1, 2):
        logbook.epoch(record(epoch, best=epoch == 2))
        assert len(synced) == epoch
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2]
    said = capsys.readouterr().out
    assert "epoch 2/2" in said and "best so far" in said and "lr 5.00e-05" in said
    assert said.count("validation") == 2


def test_numbers_that_json_cannot_say_become_null_and_stay_plottable(tmp_path):
    logbook = Logbook(tmp_path, MAIN, LogOptions(), {})
    odd = {"loss": math.nan, "bce": math.inf, "iou": torch.tensor(0.25), "dice": np.float32(0.5)}
    logbook.epoch({"epoch": 1, "validation": odd, "folder": tmp_path, "list": [np.nan, 1]})

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=refuse)
    assert line["validation"] == {"loss": None, "bce": None, "iou": 0.25, "dice": 0.5}
    assert line["list"] == [None, 1]
    logbook.curves()
    assert (tmp_path / "curves.png").exists()


def test_each_line_and_the_picture_state_the_prompt(tmp_path, monkeypatch):
    """Scores under the box of the true mask are an upper bound, so they never stand alone."""
    titles = []
    monkeypatch.setattr(logbook_module, "draw_curves", lambda *args: titles.append(args[2]))
    logbook = Logbook(tmp_path, MAIN, LogOptions(), {"prompt": "box"})
    logbook.epoch(record(1))
    logbook.curves()
    assert lines(tmp_path)[0]["prompt"] == "box"
    assert titles == 2 * [f"{tmp_path.name}, prompt: box"]


def test_curves_appear_with_the_first_epoch_are_not_drawn_all_the_time_and_end_complete(
    tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(
        logbook_module, "draw_curves", lambda records, *_: drawn.append(len(records))
    )
    logbook = Logbook(tmp_path, MAIN, LogOptions(), {})
    for epoch in range(1, 6):
        logbook.epoch(record(epoch))
    logbook.close()
    assert drawn == [1, 5]


def test_a_resumed_run_tells_no_epoch_twice(tmp_path):
    first = Logbook(tmp_path, MAIN, LogOptions(), {})
    for epoch in (1, 2, 3):
        first.epoch(record(epoch))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "tr')  # killed while writing
    resumed = Logbook(tmp_path, MAIN, LogOptions(), {}, keep_before_epoch=3)
    assert [r["epoch"] for r in resumed.records] == [1, 2]
    resumed.epoch(record(3))
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2, 3]
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "curves.png"}, "nothing left"


def test_cutting_the_record_is_atomic(tmp_path, monkeypatch):
    Logbook(tmp_path, MAIN, LogOptions(), {}).epoch(record(1))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Logbook(tmp_path, MAIN, LogOptions(), {}, keep_before_epoch=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_only_rank_0_speaks_and_writes(tmp_path, capsys):
    logbook = Logbook(tmp_path, OTHER, LogOptions(wandb=True), {})
    logbook.say("hello")
    logbook.epoch(record(1))
    logbook.curves()
    assert list(logbook.progress([1, 2, 3], "work")) == [1, 2, 3]
    logbook.close()
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_a_console_logbook_needs_no_folder(capsys):
    Logbook.console(MAIN).say("hello")
    Logbook.console(OTHER).say("not me")
    assert capsys.readouterr().out == "hello\n"


# --- progress ------------------------------------------------------------------------------------


def test_progress_in_a_log_is_about_ten_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr(Progress, "SECONDS_BETWEEN_LINES", 0)
    assert list(Logbook.console(MAIN).progress(range(95), "training")) == list(range(95))
    out, err = capsys.readouterr()
    assert 9 <= len(out.splitlines()) <= 11 and "\r" not in out and err == ""
    assert "training: 48/95 (50 %)" in out


def test_quick_work_fills_no_log(capsys):
    list(Logbook.console(MAIN).progress(range(1000), "training"))
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_is_a_bar_and_counts_what_update_says(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Logbook.console(MAIN).progress(4, "checking") as bar:
        bar.update(3)
        bar.update(1)
        assert bar.done == 4
    assert "checking" in terminal.getvalue() and "\r" in terminal.getvalue()
    assert capsys.readouterr().out == ""


# --- curves and summary --------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    return figures


def test_curves_show_loss_iou_dice_and_rate_and_mark_the_best_epoch(tmp_path, drawn):
    from PIL import Image

    records = [record(1, True), record(2, True, iou=0.8), record(3)]
    draw_curves(records, tmp_path / "curves.png", "run")
    (figure,) = drawn
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "learning rate", "IoU", "Dice"]
    for axes in figure.axes:
        assert axes.get_xlabel() == "epoch"
        assert any(list(line.get_xdata()) == [2, 2] for line in axes.lines), "the best epoch"
    labels = figure.axes[2].get_legend_handles_labels()[1]
    assert labels == ["train", "validation", "best: epoch 2, 0.8"]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1260, 840)


@pytest.mark.parametrize(
    "records",
    [
        [{"epoch": 1}],
        [record(1)],
        [{"epoch": 5, "train": {"loss": None}, "validation": None, "best": True}],
    ],
    ids=["nothing", "one epoch", "best without validation"],
)
def test_curves_of_scanty_records_are_drawn_all_the_same(records, tmp_path, drawn):
    draw_curves(records, tmp_path / "curves.png", "run")
    assert len(drawn) == 1


def test_a_picture_that_cannot_be_drawn_ends_no_run(tmp_path, monkeypatch, capsys):
    logbook = Logbook(tmp_path, MAIN, LogOptions(), {})

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(logbook_module, "draw_curves", broken)
    logbook.epoch(record(1))
    assert "curves.png could not be drawn: disk full" in capsys.readouterr().out


def test_parameter_summary_counts_shared_and_frozen_parameters_once():
    model = nn.ModuleDict({"first": nn.Linear(10, 10), "second": nn.Linear(10, 10)})
    model["second"].weight = model["first"].weight
    model["first"].bias.requires_grad_(False)
    text = parameter_summary(model)
    assert text.endswith("parameters: 110 trainable (91.67 %), 10 frozen, 120 in all")
    assert "first" in text and "Trainable" in text
    assert "Total params" not in text


# --- Weights & Biases ----------------------------------------------------------------------------


class FakeWandb(SimpleNamespace):
    """Takes the calls; has no `watch`, so watching anything would fail.

    fail_at: "init", "log", or "online", which is "init" but only there. answered: cleared, the
    server takes the connection and says nothing.
    """

    def __init__(self, fail_at=""):
        self.calls, self.logged, self.fail_at, self.finished = [], [], fail_at, 0
        self.defined, self.torn_down = {}, 0
        self.asked, self.answered = threading.Event(), threading.Event()
        self.url, self.dir = "https://example.org/run", "/somewhere/files"
        self.answered.set()
        super().__init__(Settings=lambda **k: SimpleNamespace(**k))

    def setup(self):
        return SimpleNamespace(settings=SimpleNamespace(base_url="https://w.example.org"))

    def teardown(self):
        self.torn_down += 1

    def init(self, **kwargs):
        self.calls.append(kwargs)
        self.asked.set()
        self.answered.wait()
        if self.fail_at == "init" or self.fail_at == kwargs["mode"]:
            raise RuntimeError(f"the server did not like {KEY}\nand much more")
        return self

    def define_metric(self, name, step_metric):
        self.defined[name] = step_metric

    def log(self, values, step):
        if self.fail_at == "log":
            raise ConnectionError("gone")
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def fake(monkeypatch, no_wandb_environment):
    def install(fail_at="", there=True):
        wandb = FakeWandb(fail_at)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        monkeypatch.setattr(wandb_run, "_answers", lambda server: there)
        return wandb

    return install


def test_wandb_hears_of_each_epoch_under_the_parents_names_and_watches_nothing(tmp_path, fake):
    """The parent watched every frozen parameter, with histograms; here no weight is sent."""
    wandb = fake()
    logbook = Logbook(tmp_path, MAIN, LogOptions(wandb=True), {"lr": 1e-4, "path": tmp_path})
    logbook.epoch(record(1))
    logbook.epoch(record(2, loss=math.nan))
    logbook.close()
    assert [values["Epoch"] for _, values in wandb.logged] == [1, 2]
    assert {wandb.defined[n] for n in ("Train *", "Validation *", "Learning Rate")} == {"Epoch"}
    assert wandb.logged[0][1].keys() >= {*PARENTS_NAMES, "Learning Rate", "Validation Loss"}
    assert "Validation Loss" not in wandb.logged[1][1], "NaN is left out"
    assert wandb.calls[0]["config"] == {"lr": 1e-4, "path": str(tmp_path)}
    assert wandb.finished == 1


def test_a_resumed_run_goes_on_in_the_same_charts(tmp_path, fake):
    wandb = fake()
    for _ in range(2):
        Logbook(tmp_path, MAIN, LogOptions(wandb=True, wandb_mode="online"), {})
    first, second = wandb.calls
    assert first["id"] == second["id"] and second["resume"] == "allow"


@pytest.mark.parametrize(
    ("asked", "environment", "netrc", "mode"),
    [
        ("auto", {}, "", "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "", "online"),
        ("auto", {}, "machine api.wandb.ai login user password x", "online"),
        ("auto", {}, "machine example.org login user password x", "offline"),
        ("auto", {}, "default login user password x", "offline"),
        ("auto", {}, "this is { no netrc", "offline"),
        ("auto", {"WANDB_BASE_URL": "https://w.example.org"},
         "machine w.example.org login u password x", "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "", "disabled"),
        ("offline", {"WANDB_API_KEY": KEY}, "", "offline"),
        ("online", {}, "", "online"),
    ],
)  # fmt: skip
def test_the_mode_is_always_explicit(asked, environment, netrc, mode, tmp_path, fake, monkeypatch):
    wandb = fake()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (Path.home() / ".netrc").write_text(netrc + "\n")
    Logbook(tmp_path, MAIN, LogOptions(wandb=True, wandb_mode=asked), {})
    assert wandb.calls[0]["mode"] == mode
    assert wandb.calls[0]["dir"] == str(tmp_path)


@pytest.mark.parametrize("fail_at", ["init", "log"])
def test_a_failing_wandb_is_one_warning_and_training_goes_on(
    fail_at, tmp_path, fake, monkeypatch, capsys
):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    fake(fail_at)
    stdin = sys.stdin
    logbook = Logbook(tmp_path, MAIN, LogOptions(wandb=True), {})
    for epoch in (1, 2, 3):
        logbook.epoch(record(epoch))
    logbook.close()
    out, err = capsys.readouterr()
    assert (out + err).count("warning:") == 1
    assert KEY not in out + err and "and much more" not in out
    assert len(lines(tmp_path)) == 3
    assert sys.stdin is stdin


@pytest.mark.parametrize(("fail_at", "there"), [("online", True), ("", False)])
def test_a_run_that_cannot_start_online_is_kept_on_disk_whole(
    fail_at, there, tmp_path, fake, monkeypatch, capsys
):
    """A wrong key, or no route: nothing is lost, and `wandb sync` can send it."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    wandb = fake(fail_at, there)
    logbook = Logbook(tmp_path, MAIN, LogOptions(wandb=True), {})
    for epoch in (1, 2):
        logbook.epoch(record(epoch))
    logbook.close()
    assert [call["mode"] for call in wandb.calls] == ["online", "offline"][not there :]
    assert len({call["id"] for call in wandb.calls}) == 1 and wandb.torn_down == there
    assert [values["Epoch"] for _, values in wandb.logged] == [1, 2] and wandb.finished == 1
    said = capsys.readouterr().out
    assert said.count("warning:") == 1 and KEY not in said
    assert "wandb sync /somewhere" in said
    assert ("the server did not like ***" if there else "w.example.org does not answer") in said


def test_no_step_waits_for_a_server_that_takes_the_connection_and_says_nothing(
    tmp_path, fake, monkeypatch
):
    """Records are on disk while W&B still waits; it gets them all once the server speaks."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb_run, "_START_SECONDS", 0.01)
    wandb = fake()
    wandb.answered.clear()
    logbook = Logbook(tmp_path, MAIN, LogOptions(wandb=True), {})
    for epoch in (1, 2, 3):
        logbook.step({"kind": "step", "epoch": epoch, "step": epoch, "step_of_epoch": 1, "lr": 0.1})
        logbook.epoch(record(epoch))
    assert wandb.asked.wait(60), "W&B has not even been asked"
    assert len(lines(tmp_path)) == 6 and not wandb.logged
    wandb.answered.set()
    logbook.close()
    assert len(wandb.logged) == 6 and wandb.finished == 1
    assert [values["Epoch"] for _, values in wandb.logged[1::2]] == [1, 2, 3]


def test_the_end_of_a_run_waits_for_wandb_within_bounds(tmp_path, fake, monkeypatch, capsys):
    for name in ("_START_SECONDS", "_END_SECONDS"):
        monkeypatch.setattr(wandb_run, name, 0.01)
    wandb = fake()
    wandb.answered.clear()
    logbook = Logbook(tmp_path, MAIN, LogOptions(wandb=True), {})
    logbook.epoch(record(1))
    logbook.close()
    assert "warning: Weights & Biases has not finished" in capsys.readouterr().out
    assert len(lines(tmp_path)) == 1 and not wandb.finished
    wandb.answered.set()


def test_a_server_is_there_if_it_says_anything():
    """A web server that refuses is one; one that says nothing, or nobody, is none."""
    with socket.socket() as server, pytest.MonkeyPatch.context() as patched:
        patched.setattr(wandb_run, "_ANSWER_SECONDS", 0.2)
        server.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert not wandb_run._answers(address), "nobody listens"
        server.listen()
        assert not wandb_run._answers(address), "connected, and silence"
        assert not wandb_run._answers("no address")

        patched.setattr(wandb_run, "_ANSWER_SECONDS", 30)
        threading.Thread(target=_refuse_all, args=(server,), daemon=True).start()
        assert wandb_run._answers(address), "404 is an answer"
        server.shutdown(socket.SHUT_RDWR)


def _refuse_all(server):
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # the test is over
            return
        with connection, contextlib.suppress(OSError):  # or who asked is gone
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")


def test_without_the_package_there_is_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    Logbook(tmp_path, MAIN, LogOptions(wandb=True), {}).epoch(record(1))
    assert capsys.readouterr().out.count("warning:") == 1


def test_wandb_is_not_even_imported_unless_asked_for(tmp_path):
    script = (
        "import sys, torch; from pathlib import Path; from samtune.config import LogOptions;"
        "from samtune.engine.distributed import Process;"
        "from samtune.engine.logbook import Logbook;"
        f"log = Logbook(Path({str(tmp_path)!r}), Process(0, 1, 0, torch.device('cpu')),"
        "LogOptions(), {}); log.say('hello');"
        "sys.exit('wandb' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], env=_environment(tmp_path)).returncode == 0
    )


SCRIPT = f"""
import sys, torch
from pathlib import Path
from samtune.config import LogOptions
from samtune.engine.distributed import Process
from samtune.engine.logbook import Logbook
log = Logbook(Path(sys.argv[1]), Process(0, 1, 0, torch.device("cpu")),
              LogOptions(wandb=True, wandb_mode=sys.argv[2]), {{"prompt": "box"}})
for epoch in (1, 2):
    log.epoch({record(1)} | {{"epoch": epoch}})
log.close()
print("trained on")
"""


def _environment(home, **more):
    kept = {n: v for n, v in os.environ.items() if not n.startswith("WANDB") and n != "NETRC"}
    code = str(Path(logbook_module.__file__).parents[2])
    return kept | {
        "HOME": str(home), "PYTHONPATH": code, "OMP_NUM_THREADS": "1",
        "WANDB_BASE_URL": "http://127.0.0.1:9",  # nobody listens: no test talks to the world
        "WANDB_ERROR_REPORTING": "false", **more,
    }  # fmt: skip


def _on_a_terminal(folder, home, mode, **environment):
    """Run SCRIPT with a pseudo-terminal as stdin and stderr: what W&B needs to ask for a key."""
    controller, terminal = pty.openpty()
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder), mode], stdin=terminal, stderr=terminal,
            stdout=subprocess.PIPE, text=True, env=_environment(home, **environment),
            start_new_session=True,
        )  # fmt: skip
        os.close(terminal)
        try:
            out, _ = process.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return process.returncode, out, _drain(controller), time.monotonic() - start
    finally:
        os.close(controller)


def _drain(controller):
    os.set_blocking(controller, False)
    said = b""
    try:
        while part := os.read(controller, 65536):
            said += part
    except OSError:  # nothing left, or the other end is closed
        pass
    return said.decode()


@pytest.fixture
def rooms(tmp_path):
    folder, home = tmp_path / "run", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    return folder, home


@pytest.fixture
def real_wandb():
    pytest.importorskip("wandb")


def test_without_a_key_the_real_wandb_logs_offline_and_asks_nothing(rooms, real_wandb):
    """The parent demanded a login at start-up; on a terminal without a key it sat and waited."""
    folder, home = rooms
    code, out, err, seconds = _on_a_terminal(folder, home, "auto")
    assert code == 0 and "trained on" in out and "warning" not in out
    assert "api key" not in (out + err).lower() and "choice" not in (out + err).lower()
    assert seconds < 60
    assert len(lines(folder)) == 2
    (written,) = folder.rglob("*.wandb")
    content = written.read_bytes()
    for name in PARENTS_NAMES:
        assert name.encode() in content


def test_online_without_a_key_the_real_wandb_is_one_warning_and_no_question(rooms, real_wandb):
    folder, home = rooms
    code, out, err, seconds = _on_a_terminal(folder, home, "online")
    assert code == 0 and "trained on" in out
    assert out.count("warning:") == 1
    assert "choice" not in (out + err).lower()
    assert seconds < 60


def test_a_key_appears_in_no_file_and_no_output(rooms, real_wandb):
    folder, home = rooms
    code, out, err, _ = _on_a_terminal(folder, home, "offline", WANDB_API_KEY=KEY)
    assert code == 0 and "trained on" in out
    assert KEY not in out + err
    files = [p for room in rooms for p in room.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files)
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


def test_with_a_key_and_no_server_the_real_wandb_keeps_the_run_on_disk(rooms, real_wandb):
    folder, home = rooms
    code, out, err, _ = _on_a_terminal(folder, home, "auto", WANDB_API_KEY=KEY)
    assert code == 0 and "trained on" in out
    assert out.count("warning:") == 1 and KEY not in out + err
    assert "127.0.0.1:9 does not answer" in out and "wandb sync" in out
    (written,) = folder.rglob("offline-run-*/*.wandb")
    assert all(name.encode() in written.read_bytes() for name in PARENTS_NAMES)
