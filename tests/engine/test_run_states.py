"""Run states: whole or not there, whatever happens while they are written; damage is found."""

import errno
import os
import random
import time

import pytest
import torch
from engine_standins import METADATA, new_model, same
from safetensors.torch import load_file, save_file

from crash_points import faults, full_disk, in_fork, killed, mount
from samtune.engine import durable
from samtune.engine.checkpoint import Checkpoints, load_adapted, read_metadata, save_adapted
from samtune.engine.durable import checksum, write_atomically
from samtune.engine.run_states import RunStates, load_run_state, save_run_state
from samtune.errors import UserError
from samtune.run_folder import ROOT, RunFolder, newest, to_resume


def state_of(epoch: int) -> dict:
    """A small state that differs from that of any other epoch."""
    generator = torch.Generator().manual_seed(epoch)
    weights = {"a": torch.rand(3000, generator=generator), "b": torch.tensor(epoch)}
    moments = {0: {"step": torch.tensor(float(epoch)), "exp_avg": weights["a"].bfloat16()}}
    return {"model": weights, "epoch": epoch, "optimizer": {"state": moments, "betas": (0.9, 0.99)}}


def states(folder, *epochs: int, keep: int = 2) -> RunStates:
    """A folder in which these epochs were saved one after the other."""
    kept = RunStates(RunFolder(folder), keep)
    for epoch in epochs:
        kept.save(state_of(epoch))
    return kept


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def epochs_in(folder) -> list[int]:
    return [load_run_state(path)["epoch"] for path in RunFolder(folder).states()]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (1, ["last.pt"]),
        (2, ["last-1.pt", "last.pt"]),
        (4, ["last-1.pt", "last-2.pt", "last-3.pt", "last.pt"]),
    ],
)
def test_as_many_states_stay_as_are_to_be_kept(tmp_path, keep, left):
    states(tmp_path, *range(6), keep=keep)
    assert names(tmp_path) == left
    assert epochs_in(tmp_path) == [5, 4, 3, 2][:keep]
    state, path, warning = RunStates(RunFolder(tmp_path)).load()
    assert same(state, state_of(5)) and path.name == "last.pt" and not warning


def test_another_number_may_be_kept_from_now_on(tmp_path):
    states(tmp_path, *range(5), keep=4)
    states(tmp_path, 5, keep=2)
    assert epochs_in(tmp_path) == [5, 4]
    states(tmp_path, 6, keep=3)
    assert epochs_in(tmp_path) == [6, 5, 4]
    with pytest.raises(UserError, match="--keep 0: must be at least 1"):
        RunStates(RunFolder(tmp_path), 0)


def test_without_hard_links_the_states_are_kept_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: full_disk())
    states(tmp_path, *range(4), keep=3)
    assert names(tmp_path) == ["last-1.pt", "last-2.pt", "last.pt"]
    assert epochs_in(tmp_path) == [3, 2, 1]


def saving(folder, monkeypatch, at, strike, keep=2) -> int:
    """Save epoch 3 upon 0, 1 and 2 with a fault; returns how many operations there were."""
    with faults(monkeypatch, at, strike) as counted:
        RunStates(RunFolder(folder), keep).save(state_of(3))
    return counted.done


def operations(tmp_path, monkeypatch, keep=2) -> int:
    folder = tmp_path / "counting"
    folder.mkdir()
    states(folder, 0, 1, 2, keep=keep)
    return saving(folder, monkeypatch, -1, killed, keep)


@pytest.mark.parametrize("keep", [2, 3])
def test_killed_at_any_moment_of_a_save_a_whole_state_is_there(tmp_path, monkeypatch, keep):
    """kill -9 at each operation of a save in turn: the new state or the one before is loaded as it
    was, without a warning, `last.pt` is never missing, and the next save leaves nothing over."""
    seen = set()
    for at in range(count := operations(tmp_path, monkeypatch, keep)):
        folder = tmp_path / str(at)
        folder.mkdir()
        states(folder, 0, 1, 2, keep=keep)
        assert in_fork(lambda to=folder, at=at: saving(to, monkeypatch, at, killed, keep)) == -9
        assert (folder / "last.pt").exists()
        state, path, warning = RunStates(RunFolder(folder)).load()
        assert path.name == "last.pt" and not warning
        assert same(state, state_of(state["epoch"]))
        seen.add(state["epoch"])
        assert len(epochs_in(folder)) >= keep
        states(folder, 4, keep=keep)
        left = epochs_in(folder)
        assert left[:2] == [4, state["epoch"]][:keep] and len(left) == keep
        assert not [name for name in names(folder) if name.startswith(".")]
    assert count > 8 and seen == {2, 3}


def test_a_disk_that_fills_up_at_any_moment_of_a_save_is_said_and_harms_nothing(
    tmp_path, monkeypatch
):
    for at in range(operations(tmp_path, monkeypatch)):
        folder = tmp_path / str(at)
        folder.mkdir()
        states(folder, 0, 1, 2)
        said = ""
        try:
            saving(folder, monkeypatch, at, full_disk)
        except UserError as error:
            said = str(error)
        state, path, warning = RunStates(RunFolder(folder)).load()
        assert path.name == "last.pt" and not warning and same(state, state_of(state["epoch"]))
        if state["epoch"] == 2:
            assert said == (
                f"{folder}/last.pt could not be written: No space left on device; "
                "the previous file is unchanged"
            )
        states(folder, 4)
        assert len(epochs_in(folder)) == 2 and epochs_in(folder)[0] == 4


def test_a_disk_that_is_really_full(tmp_path):
    """A disk of 200 KB, which holds two states but not three."""

    def fill():
        mount(tmp_path, size=200_000)
        kept = RunStates(RunFolder(tmp_path))
        big = {"model": {"a": torch.rand(20_000)}}
        kept.save(big | {"epoch": 0})
        kept.save(big | {"epoch": 1})
        with pytest.raises(UserError, match=r"last.pt could not be written: No space left"):
            kept.save(big | {"epoch": 2})
        assert epochs_in(tmp_path) == [1, 0] and names(tmp_path) == ["last-1.pt", "last.pt"]

    assert in_fork(fill) == 0


def test_a_folder_that_is_really_read_only(tmp_path):
    states(tmp_path, 0, 1)

    def refuse():
        mount(tmp_path)
        for write in (
            lambda: RunStates(RunFolder(tmp_path)).save(state_of(2)),
            lambda: save_adapted(tmp_path / "best.safetensors", new_model(), METADATA),
        ):
            with pytest.raises(UserError, match="could not be written: Read-only file system"):
                write()
        with pytest.raises(UserError, match=r"--output_dir .* cannot be written: Read-only"):
            RunFolder(tmp_path).occupy((), new=False)
        assert epochs_in(tmp_path) == [1, 0]

    assert in_fork(refuse) == 0


def damage(path, how: str, seed: int = 0) -> None:
    content = bytearray(path.read_bytes())
    draw = random.Random(seed)
    if how == "truncated":
        content = content[: draw.randrange(len(content))]
    elif how == "zeros":
        start = draw.randrange(len(content) - 64)
        content[start : start + 64] = bytes(64)
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["bit", "truncated", "zeros"])
def test_a_damaged_state_is_found_wherever_it_is_damaged(tmp_path, how):
    """Or the damage lies where no content is, between the parts of the file."""
    states(tmp_path, 5)
    whole, found = (tmp_path / "last.pt").read_bytes(), 0
    for seed in range(60):
        (tmp_path / "last.pt").write_bytes(whole)
        damage(tmp_path / "last.pt", how, seed)
        try:
            state = load_run_state(tmp_path / "last.pt")
        except UserError as error:
            assert str(tmp_path / "last.pt") in str(error)
            found += 1
        else:
            assert same(state, state_of(5)), seed
    assert found > 20


def test_a_byte_of_the_weights_that_changed_is_found(tmp_path):
    """torch itself does not notice: it maps the file and reads no checksum."""
    path = tmp_path / "last.pt"
    states(tmp_path, 5)
    content = bytearray(path.read_bytes())
    start = content.index(state_of(5)["model"]["a"].numpy().tobytes())
    content[start + 40] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True, mmap=True)
    with pytest.raises(UserError, match=r"last.pt is damaged: .* checksum"):
        load_run_state(path)


def test_a_damaged_state_is_passed_over_for_the_one_before_and_that_is_said(tmp_path):
    states(tmp_path, 1, 2, 3, keep=3)
    damage(tmp_path / "last.pt", "truncated")
    kept = RunStates(RunFolder(tmp_path), 3)
    state, path, warning = kept.load()
    assert state["epoch"] == 2 and path == tmp_path / "last-1.pt"
    assert warning.startswith(f"warning: {tmp_path}/last.pt is ") and str(path) in warning
    assert warning.count("warning") == 1 and "\n" not in warning
    kept.save(state_of(4))  # in the place of the damaged one: the good ones stay
    assert epochs_in(tmp_path) == [4, 2, 1]


def test_two_damaged_states_are_passed_over_and_three_are_an_error(tmp_path):
    states(tmp_path, 1, 2, 3, keep=3)
    (tmp_path / "last.pt").write_bytes(b"")
    (tmp_path / "last-1.pt").write_bytes(b"PK\3\4 not really")
    kept = RunStates(RunFolder(tmp_path), 3)
    state, _, warning = kept.load()
    assert state["epoch"] == 1 and all(f"last{n}.pt" in warning for n in ("", "-1", "-2"))
    (tmp_path / "last-2.pt").write_text("<html>")
    with pytest.raises(UserError, match=r"no state to go on from: .*last-1.*last-2.*anew in"):
        RunStates(RunFolder(tmp_path), 3).load()
    kept.save(state_of(9))  # what was loaded before stays beside the new one
    assert load_run_state(tmp_path / "last.pt")["epoch"] == 9


def test_a_state_from_before_checksums_is_read(tmp_path):
    torch.save(state_of(7), tmp_path / "last.pt")
    assert same(load_run_state(tmp_path / "last.pt"), state_of(7))
    states(tmp_path, 8)
    assert epochs_in(tmp_path) == [8, 7]


def test_a_disk_that_gives_back_other_bytes_is_found_while_the_old_file_is_there(
    tmp_path, monkeypatch
):
    states(tmp_path, 1)
    save_adapted(best := tmp_path / "best.safetensors", new_model(), METADATA)
    before = best.read_bytes()

    def faulty(number):
        with open(next(tmp_path.glob(".part.*")), "r+b") as file:
            file.seek(-40, 2)
            last = file.read(40)
            file.seek(-40, 2)
            file.write(bytes(byte ^ 255 for byte in last))

    monkeypatch.setattr(durable, "_forget", faulty)
    with pytest.raises(UserError, match=r"last.pt (could not be|.*damaged)"):
        states(tmp_path, 2)
    with pytest.raises(UserError, match=r"best.* could not be written: it does not read back"):
        save_adapted(best, new_model(), METADATA)
    assert epochs_in(tmp_path) == [1] and best.read_bytes() == before
    assert names(tmp_path) == ["best.safetensors", "last.pt"]


def test_the_best_state_has_a_checksum_and_stays_plain_safetensors(tmp_path):
    path = tmp_path / "best.safetensors"
    save_adapted(path, new_model(), METADATA)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not mapped
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    assert not same(load_file(path), tensors), "safetensors itself does not notice"
    with pytest.raises(UserError, match=r"best.safetensors is damaged: .* checksum"):
        load_adapted(new_model(), path)
    save_file(tensors, path, {"samtune": '{"adapter": "tiny"}'})  # as before checksums
    load_adapted(new_model(), path)
    assert read_metadata(path) == {"adapter": "tiny"}


def test_what_the_best_state_says_of_itself_is_under_the_checksum_too(tmp_path):
    path = tmp_path / "best.safetensors"
    save_adapted(path, new_model(), METADATA)
    path.write_bytes(path.read_bytes().replace(b"toy", b"tox"))
    with pytest.raises(UserError, match="is damaged"):
        load_adapted(new_model(), path)


def test_checksums_tell_contents_apart_and_files_alike():
    content = state_of(3)
    assert checksum(content) == checksum(dict(reversed(content.items())))
    others = [
        state_of(4), content | {"epoch": 3.0}, content | {"epoch": "3"}, content | {"more": None},
        content | {"model": {"a": content["model"]["a"].reshape(50, 60), "b": torch.tensor(3)}},
        content | {"model": {"a": content["model"]["a"], "b": torch.tensor(3, dtype=torch.int32)}},
        {"model": content},
    ]  # fmt: skip
    assert len({checksum(other) for other in [content, *others]}) == len(others) + 1
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.rand(3, 4)[:, :2].fill_(1)) == checksum(torch.ones(3, 2))
    assert checksum(torch.empty(0)) == checksum(torch.empty(0))


def test_the_last_state_of_a_run_is_the_one_that_all_ranks_load(tmp_path):
    saved = Checkpoints(RunFolder(tmp_path), METADATA)
    for epoch in (1, 2):
        saved.save_last(state_of(epoch))
    damage(tmp_path / "last.pt", "truncated")
    assert saved.load_last()["epoch"] == 1 and "last-1.pt" in saved.warning
    with pytest.raises(UserError, match=r"last-1.pt belongs to another model"):
        Checkpoints(RunFolder(tmp_path), METADATA | {"model_type": "other"}).load_last()


@pytest.mark.parametrize("ahead", [-3600, 3600])
def test_the_run_that_saved_last_is_the_newest_on_a_clock_that_was_set_back(
    tmp_path, monkeypatch, ahead
):
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new"):
        saved = Checkpoints(RunFolder(ROOT / name), METADATA)
        saved.folder.path.mkdir(parents=True)
        saved.save_best(new_model())
        saved.save_last(state_of(1))
        if name == "old":
            for path in saved.folder.path.iterdir():
                os.utime(path, (time.time() + ahead,) * 2)
    saved.save_last(state_of(2))
    assert to_resume("auto", "").path.name == newest().path.name == "new"


def test_a_name_is_on_disk_when_the_file_is_said_to_be_written(tmp_path, monkeypatch):
    """The folder is flushed too; a system that cannot do that is no reason to fail."""
    flushed, fsync = [], os.fsync

    def note(number):
        flushed.append(os.fstat(number).st_ino)
        if flushed[-1] == tmp_path.stat().st_ino:
            raise OSError(errno.EINVAL, "not here")
        fsync(number)

    monkeypatch.setattr(os, "fsync", note)
    write_atomically(tmp_path / "a", lambda file: file.write(b"x"))
    assert flushed == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]


def test_saving_as_it_is_named(tmp_path):
    """The name under which a state is read back has its extension, which says how to read it."""
    save_run_state(tmp_path / "last.pt", state_of(1))
    assert names(tmp_path) == ["last.pt"]
