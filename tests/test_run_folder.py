"""Run folders: an existing run is never overwritten, the newest is found, the right one goes on."""

import os

import pytest

from samtune import run_folder
from samtune.errors import UserError
from samtune.run_folder import RunFolder, date_after, latest_save, new_name, newest, to_resume


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(name: str, file: str, age: float) -> RunFolder:
    folder = RunFolder(run_folder.ROOT / name)
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder.path / file).touch()
    os.utime(folder.path / file, (1e9 - age, 1e9 - age))
    return folder


@pytest.mark.parametrize("file", ["best.safetensors", "last.pt"])
def test_a_folder_that_holds_a_run_is_refused(file):
    with pytest.raises(UserError, match="--resume checkpoints/a"):
        make_run("a", file, 0).create()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output_dir file/run cannot be written"):
        RunFolder("file/run").create()


def test_an_empty_folder_is_welcome(tmp_path):
    (tmp_path / "run").mkdir()
    RunFolder("run").create()
    assert list((tmp_path / "run").iterdir()) == []


def test_newest_is_by_time_not_by_name():
    make_run("z", "best.safetensors", age=100)
    make_run("a", "best.safetensors", age=1)
    make_run("unfinished", "last.pt", age=0)
    assert newest().path.name == "a"


def test_newest_without_runs_says_what_to_do():
    with pytest.raises(UserError, match=r"\./run\.sh"):
        newest()


def test_resume():
    make_run("old", "last.pt", age=100)
    young = make_run("young", "last.pt", age=1)
    assert to_resume("", "") is None
    assert to_resume("auto", "").path == young.path
    assert to_resume("auto", "checkpoints/old").path.name == "old"
    assert to_resume("auto", "checkpoints/none") is None
    assert to_resume("checkpoints/old", "").path.name == "old"
    assert to_resume("checkpoints/old/last.pt", "").path.name == "old"
    with pytest.raises(UserError, match="--resume checkpoints/none"):
        to_resume("checkpoints/none", "")


def test_an_older_state_is_enough_to_go_on():
    """`last.pt` may have been moved away, or lost where a disk has no hard links."""
    make_run("a", "last-1.pt", age=1)
    make_run("a2", "last-0.pt", age=0)
    make_run("a3", "last-x.pt", age=0)
    assert to_resume("auto", "").path.name == "a"
    assert to_resume("checkpoints/a", "").states() == [RunFolder("checkpoints/a").state(1)]
    with pytest.raises(UserError, match=r"checkpoints/a/last-1\.pt: name the folder"):
        to_resume("checkpoints/a/last-1.pt", "")
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder("checkpoints/a").create()


def test_states_are_in_the_order_of_their_age():
    for age in (10, 2, 1, 0):
        folder = make_run("a", RunFolder("x").state(age).name, age=-age)
    assert [path.name for path in folder.states()] == [
        "last.pt", "last-1.pt", "last-2.pt", "last-10.pt"
    ]  # fmt: skip


@pytest.mark.parametrize("jump", [-86400.0, -1.0, 0.0, 3600.0])
def test_the_newest_run_is_the_one_saved_last_whatever_the_clock_says(jump):
    """It is set back, or on, between two runs; the later save is dated later."""
    for file, find in (("last.pt", lambda: to_resume("auto", "")), ("best.safetensors", newest)):
        first = make_run("first", file, age=0)
        earlier = latest_save()
        second = make_run("second", file, age=-jump)
        date_after(second.path / file, earlier)
        assert find().path == second.path
        assert os.stat(second.path / file).st_mtime > os.stat(first.path / file).st_mtime
        for path in (first.path / file, second.path / file):
            path.unlink()


def test_a_clock_that_was_set_back_never_gives_a_name_that_is_taken(monkeypatch):
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "1120_082244")
    names = []
    for _ in range(3):
        names.append(new_name("lora", "vit_b"))
        names[-1].mkdir(parents=True)
    assert [name.name for name in names] == [
        f"1120_082244_lora_vit_b{end}" for end in ("", "_2", "_3")
    ]
