"""One run at a time in a folder, whatever becomes of it; and whose run it is."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from crash_points import in_fork
from samtune import run_lock
from samtune.errors import UserError
from samtune.run_folder import RunFolder, begun_by_this_launch
from samtune.run_lock import RunLock, launch_name, launches_in


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


def held_by_another(folder, and_then=lambda: None) -> int:
    """A process that occupies a folder, says so, and stays until it is killed; its id."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            lock = RunFolder(folder).occupy(["launch 1"], new=True)
            and_then()
            os.write(writing, b"held")
            time.sleep(600)
            lock.release()
        finally:
            os._exit(1)
    assert os.read(reading, 4) == b"held"
    os.close(reading), os.close(writing)
    return process


def end(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(tmp_path):
    """With the folder and the process that is at work there; kill -9 frees it."""
    other = held_by_another("run")
    try:
        for new in (True, False):
            with pytest.raises(UserError) as caught:
                RunFolder("run").occupy([], new)
            said = str(caught.value)
            assert said.startswith("--output_dir run: another run is at work there (process ")
            assert f"(process {other} on " in said and "choose another folder" in said
        assert launches_in(tmp_path / "run") == ["launch 1"], "the refused one changed nothing"
    finally:
        end(other)
    lock = RunFolder("run").occupy(["launch 2"], new=True)
    lock.release()
    assert launches_in(tmp_path / "run") == ["launch 2"]


def test_what_a_killed_run_has_forked_does_not_hold_its_folder():
    """Loader processes may outlive a rank that was killed."""
    reading, writing = os.pipe()

    def fork_one():
        if os.fork() == 0:
            os.write(writing, str(os.getpid()).ljust(10).encode())
            time.sleep(600)

    end(held_by_another("run", fork_one))
    orphan = int(os.read(reading, 10))
    try:
        os.kill(orphan, 0)
        RunFolder("run").occupy([], new=True).release()
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_a_run_that_ends_lets_the_next_one_in():
    assert in_fork(lambda: RunFolder("run").occupy(["a"], new=True)) == 0
    RunFolder("run").occupy(["b"], new=True).release()
    RunFolder("run").occupy(["c"], new=True).release()


def test_a_disk_without_locks_is_said_and_the_run_goes_on(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    lock = RunFolder("run").occupy(["a"], new=True)
    assert lock.warning.startswith("warning: the disk of run does not lock files (No locks")
    lock.release()


def test_a_withdrawn_lock_leaves_what_was_there(tmp_path):
    RunFolder("run").occupy([], new=True).withdraw()
    assert list((tmp_path / "run").iterdir()) == []
    RunFolder("run").occupy(["a"], new=True).release()
    RunFolder("run").occupy(["b"], new=True).withdraw()
    assert (tmp_path / "run/.lock").exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"process": 3}'])
def test_a_lock_that_says_nothing_useful_harms_nothing(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    assert launches_in(tmp_path) == []
    lock = RunLock(tmp_path)
    lock.sign(["a"])
    lock.release()
    assert json.loads((tmp_path / ".lock").read_text())["launches"] == ["a"]


def test_a_refused_folder_is_not_signed(tmp_path):
    """Else the launcher that was refused would take the run for its own when it starts again."""
    folder = RunFolder("run")
    folder.occupy(["theirs"], new=True).release()
    folder.last.touch()
    with pytest.raises(UserError, match="already holds a run"):
        folder.occupy(["ours"], new=True)
    assert launches_in(folder.path) == ["theirs"]
    with pytest.raises(UserError, match="already holds a run"):
        folder.occupy(["theirs"], new=True)  # a state is gone on with, not begun again


def test_what_a_launch_has_begun_it_may_begin_again():
    """It was killed after its first best state and before its first run state."""
    folder = RunFolder("run")
    folder.occupy(["ours", ""], new=True).release()
    folder.best.touch()
    with pytest.raises(UserError, match="already holds a run"):
        folder.occupy(["theirs", ""], new=True)
    folder.occupy(["ours"], new=True).release()


def test_a_launch_has_a_name_of_its_own(monkeypatch):
    """The same in all processes that it starts, now and later; none without torchrun."""
    assert launch_name() == ""
    ask = [sys.executable, "-c", "from samtune.run_lock import launch_name; print(launch_name())"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    first, second = (subprocess.check_output(ask, text=True).strip() for _ in range(2))
    assert first == second and str(os.getpid()) in first.split()
    assert launch_name() not in ("", first)
    monkeypatch.setattr(run_lock.Path, "read_text", lambda self: "")
    assert launch_name() == "", "where the system does not say"


def test_a_launch_finds_what_it_had_begun(tmp_path, monkeypatch):
    """In the folder that it names, or under checkpoints/ where the name was made up."""
    assert begun_by_this_launch("") is None
    monkeypatch.setattr(run_lock, "launch_name", lambda: "ours")
    assert begun_by_this_launch("") is None and begun_by_this_launch("named") is None
    RunFolder("checkpoints/a").occupy(["theirs"], new=True).release()
    RunFolder("checkpoints/b").occupy(["another machine", "ours"], new=True).release()
    RunFolder("checkpoints/c").path.mkdir()
    RunFolder("named").occupy(["ours"], new=True).release()
    assert begun_by_this_launch("").path.name == "b"
    assert begun_by_this_launch("named").path.name == "named"
    assert begun_by_this_launch("checkpoints/a") is None
    monkeypatch.setattr(run_lock, "launch_name", lambda: "later")
    assert begun_by_this_launch("") is None
