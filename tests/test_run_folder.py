"""Run folders: an existing run is never overwritten, the newest is found, the right one goes on."""

import os

import pytest

from samtune import run_folder
from samtune.errors import UserError
from samtune.run_folder import RunFolder, newest, to_resume


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(name: str, file: str, age: float) -> RunFolder:
    folder = RunFolder(run_folder.ROOT / name)
    folder.path.mkdir(parents=True)
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
