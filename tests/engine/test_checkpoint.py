"""What is saved is what was tuned; it comes back bit for bit, or the file is refused by name."""

import json
import os

import pytest
import torch
from engine_standins import METADATA, TinySegmenter, new_model, same
from torch import nn

from samtune.engine import checkpoint
from samtune.engine.checkpoint import (
    Checkpoints,
    adapted_state,
    load_adapted,
    read_metadata,
    require_same,
    save_adapted,
    save_parent,
)
from samtune.engine.run_states import load_run_state, save_run_state
from samtune.errors import UserError
from samtune.run_folder import RunFolder


def tuned(**options) -> TinySegmenter:
    """A model whose whole state, buffers too, differs from a new one's."""
    model = new_model(**options)
    adapted = set(adapted_state(model))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in adapted and tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    return model


class Aliased(TinySegmenter):
    """One linear layer that several blocks share, as in the parent's SAM-Adapter."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(2, 2)
        self.blocks = nn.ModuleList([nn.ModuleDict({"up": self.up}) for _ in range(2)])


def test_adapted_state_is_what_the_base_file_does_not_hold():
    """Trained base parameters, new modules, and the statistics of a BatchNorm that trains."""
    assert list(adapted_state(new_model(trainable_norm=True))) == [
        "mask_decoder.mask.weight",
        "mask_decoder.mask.bias",
        "adapter.0.weight",
        "adapter.1.weight",
        "adapter.1.bias",
        "adapter.1.running_mean",
        "adapter.1.running_var",
        "adapter.1.num_batches_tracked",
    ]


def test_statistics_of_a_thawed_base_batch_norm_are_adapted_too():
    model = new_model()
    assert "image_encoder.1.running_mean" not in adapted_state(model)
    model.image_encoder[1].requires_grad_(True)
    assert "image_encoder.1.running_mean" in adapted_state(model)


def test_without_a_base_file_everything_is_saved():
    """Random frozen weights are nowhere else."""
    model = new_model()
    model.base_keys = frozenset()
    assert adapted_state(model).keys() == model.state_dict().keys()


def test_adapted_state_is_a_copy():
    model = new_model()
    state = adapted_state(model)
    with torch.no_grad():
        model.mask_decoder.mask.weight.zero_()
    assert state["mask_decoder.mask.weight"].abs().sum() > 0


@pytest.mark.parametrize("options", [{}, {"trainable_norm": True}])
def test_best_comes_back_bit_for_bit(tmp_path, options):
    model, fresh = tuned(**options), new_model(**options)
    assert not same(dict(model.state_dict()), dict(fresh.state_dict()))
    save_adapted(tmp_path / "best.safetensors", model, METADATA)
    names = load_adapted(fresh, tmp_path / "best.safetensors")
    assert set(names) == set(adapted_state(model))
    assert same(dict(model.state_dict()), dict(fresh.state_dict()))


def test_a_shared_tensor_is_saved_once_and_serves_all_its_names(tmp_path):
    model, fresh = Aliased(), Aliased()
    save_adapted(tmp_path / "best.safetensors", model, METADATA)
    names = load_adapted(fresh, tmp_path / "best.safetensors")
    assert [name for name in names if "up" in name] == ["up.weight", "up.bias"]
    assert torch.equal(fresh.blocks[1]["up"].weight, model.up.weight)


def test_the_file_says_what_it_is(tmp_path):
    folder = Checkpoints(RunFolder(tmp_path), METADATA)
    folder.save_best(new_model(), epoch=3, validation={"loss": 0.5})
    assert read_metadata(folder.folder.best) == {
        **METADATA,
        "epoch": 3,
        "validation": {"loss": 0.5},
    }
    assert not folder.folder.best_pth.exists()


def test_another_base_is_refused_by_what_differs(tmp_path):
    """The same names and shapes, but tuned upon other weights."""
    save_adapted(tmp_path / "best.safetensors", new_model(), METADATA)
    saved = read_metadata(tmp_path / "best.safetensors")
    require_same("best", saved, METADATA | {"epoch": 7})
    with pytest.raises(UserError, match=r"base_sha256 '000.*' \(here 'f00'\)"):
        require_same("best", saved, METADATA | {"base_sha256": "f00"})


def test_another_adapter_or_base_size_is_refused_with_the_differing_names(tmp_path):
    path = tmp_path / "best.safetensors"
    save_adapted(path, new_model(trainable_norm=True), METADATA)
    with pytest.raises(UserError, match=r"missing: adapter\.0\.bias; unknown: adapter\.1\.bias"):
        load_adapted(new_model(), path)
    save_adapted(path, new_model(), METADATA)
    before = dict(adapted_state(other := new_model(width=6)))
    with pytest.raises(UserError, match=r"another shape: adapter\.0\.weight \(4, 4, 3, 3\)"):
        load_adapted(other, path)
    assert same(before, adapted_state(other))  # refused before anything was loaded


def test_a_safetensors_file_must_not_hold_more_than_was_tuned(tmp_path):
    """A frozen stock weight in it means that something else was tuned there."""
    thawed = new_model()
    thawed.image_encoder.requires_grad_(True)
    save_adapted(tmp_path / "best.safetensors", thawed, METADATA)
    with pytest.raises(UserError, match=r"unknown: image_encoder\.0\.bias"):
        load_adapted(new_model(), tmp_path / "best.safetensors")


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_parents_pth_is_read_with_and_without_module(tmp_path, prefix, wrapped):
    """Its files from one and from several processes load alike (defect D11)."""
    model, fresh = tuned(), new_model()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = {name for name in model.state_dict() if name.startswith("mask_decoder.")}
    state = {prefix + k: v for k, v in model.state_dict().items() if k in trained | heads}
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "sa.pth")
    names = load_adapted(fresh, tmp_path / "sa.pth")
    assert set(names) == trained | heads
    assert same(dict(model.state_dict()), dict(fresh.state_dict()))


def test_a_full_state_dict_is_read_through_renames_and_its_aliases_dropped(tmp_path):
    """Published files have other names for some tensors, and one tensor under several names."""
    model, fresh = Aliased(), Aliased()
    state = {k.replace("adapter.", "tune."): v for k, v in model.state_dict().items()}
    state["gone.0.weight"] = torch.ones(1)
    torch.save(state, tmp_path / "full.pth")
    with pytest.raises(UserError, match=r"missing: adapter.*unknown: .*tune\.0\.weight"):
        load_adapted(fresh, tmp_path / "full.pth")
    renames = [(r"blocks\.\d+\.up\.", None), (r"gone\.", None), (r"tune\.(\d)", r"adapter.\1")]
    names = load_adapted(fresh, tmp_path / "full.pth", renames)
    assert not [name for name in names if name.startswith(("blocks", "gone", "tune"))]
    assert same(dict(model.state_dict()), dict(fresh.state_dict()))


def test_the_parents_format_has_no_prefix_and_the_whole_mask_decoder(tmp_path):
    model = tuned()
    Checkpoints(RunFolder(tmp_path), METADATA, save_pth=True).save_best(model)
    state = torch.load(tmp_path / "best.pth", weights_only=True)
    decoder = {k for k in model.state_dict() if k.startswith("mask_decoder.")}
    assert set(state) == decoder | set(adapted_state(model))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    fresh = new_model()
    load_adapted(fresh, tmp_path / "best.pth")
    assert same(dict(model.state_dict()), dict(fresh.state_dict()))


def test_the_parents_format_brings_random_base_weights_along(tmp_path):
    model = new_model()
    model.base_keys = frozenset()
    save_parent(tmp_path / "best.pth", model)
    fresh = TinySegmenter()
    fresh.base_keys = frozenset()
    load_adapted(fresh, tmp_path / "best.pth")
    assert same(dict(model.state_dict()), dict(fresh.state_dict()))


def test_run_state_comes_back(tmp_path):
    state = {"model": {"a": torch.rand(2)}, "best": float("inf"), "none": None, "list": [1, "x"]}
    save_run_state(tmp_path / "last.pt", state)
    assert same(load_run_state(tmp_path / "last.pt"), state)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("stage", ["write", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch, stage, error):
    path = tmp_path / "last.pt"
    save_run_state(path, {"model": {}, "epoch": 1})

    def fail(*_):
        raise error

    def half(state, file):
        file.write(b"half of the file")
        raise error

    if stage == "write":
        monkeypatch.setattr(torch, "save", half)
    else:
        monkeypatch.setattr(os, "replace", fail)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save_run_state(path, {"model": {}, "epoch": 2})
    if expected is UserError:
        assert str(path) in str(caught.value) and "No space left" in str(caught.value)
    assert load_run_state(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_file_gets_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    """Killed at any moment before the renaming, a run leaves the old file under the name."""
    synced, replaced = [], []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (fsync(number), synced.append(number)))

    def note(source, target):
        replaced.append((bool(synced), os.path.getsize(source), target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    save_adapted(tmp_path / "best.safetensors", new_model(), METADATA)
    size = (tmp_path / "best.safetensors").stat().st_size
    assert replaced == [(True, size, tmp_path / "best.safetensors")]


class Harmful:
    def __reduce__(self):
        return (os.system, ("exit 1",))


@pytest.mark.parametrize("reader", [load_run_state, lambda p: load_adapted(new_model(), p)])
def test_files_that_cannot_be_read_are_a_users_mistake(tmp_path, reader):
    """Missing, a web page, truncated, something else pickled, and code in a pickle."""
    path = tmp_path / "last.pth"
    with pytest.raises(UserError, match="no such file"):
        reader(path)
    path.write_text("<!DOCTYPE html><html>")
    with pytest.raises(UserError, match="a web page, not a checkpoint"):
        reader(path)
    torch.save({"model": {"a": torch.rand(100, 100)}}, path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match="damaged or not whole"):
        reader(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match=r"last\.pth (is not|does not hold tensors)"):
        reader(path)
    torch.save({"model": Harmful()}, path)
    with pytest.raises(UserError, match="could run code when read"):
        reader(path)


def test_unreadable_safetensors_are_a_users_mistake(tmp_path):
    path = tmp_path / "best.safetensors"
    for reader in (read_metadata, lambda p: load_adapted(new_model(), p)):
        with pytest.raises(UserError, match="no such file"):
            reader(path)
    path.write_bytes(b"\x10" * 100)
    for reader in (read_metadata, lambda p: load_adapted(new_model(), p)):
        with pytest.raises(UserError, match=r"not a readable safetensors file|damaged"):
            reader(path)
    path.write_bytes(checkpoint.save({"a": torch.ones(1)}, {"format": "pt"}))
    with pytest.raises(UserError, match="not samtune's"):
        read_metadata(path)


def test_metadata_is_plain_json(tmp_path):
    """Other programs can read it with the safetensors library alone."""
    from safetensors import safe_open

    save_adapted(tmp_path / "best.safetensors", new_model(), METADATA)
    with safe_open(tmp_path / "best.safetensors", "pt") as file:
        told = json.loads(file.metadata()["samtune"])
    assert len(told.pop("checksum")) == 64 and told == METADATA
