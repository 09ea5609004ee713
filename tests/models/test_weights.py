"""Every tensor of a checkpoint finds its place, or the user is told why not."""

import hashlib
import http.server
import subprocess
import threading
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from samtune.config import ModelOptions
from samtune.errors import UserError
from samtune.models import MODEL_TYPES
from samtune.models.positions import resize_pos_embed, resize_rel_pos
from samtune.models.sam import build_sam
from samtune.models.weights import (
    find_checkpoint,
    load_base,
)
from samtune.tensor_files import file_sha256, read_state_dict


@pytest.fixture
def state(tiny):
    torch.manual_seed(0)
    state = build_sam(tiny).state_dict()
    return {name: torch.randn_like(tensor) for name, tensor in state.items()}


def save(path, state):
    torch.save(state, path)
    return path


# Reading


def test_formats_and_wrappings_read_alike(tmp_path, state):
    save_file(state, tmp_path / "a.safetensors")
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    files = [
        tmp_path / "a.safetensors",
        tmp_path / "old.pth",
        save(tmp_path / "a.pth", state),
        save(tmp_path / "ordered.pth", OrderedDict(state)),
        save(tmp_path / "wrapped.pt", {"model": state, "epoch": 3}),
        save(tmp_path / "twice.pth", {"state_dict": {"model_state_dict": prefixed}}),
        save(tmp_path / "prefixed.pth", prefixed),
    ]
    for path in files:
        read = read_state_dict(path)
        assert read.keys() == state.keys(), path
        assert all(torch.equal(read[name], state[name]) for name in state), path


def test_a_prefix_on_some_names_only_is_kept(tmp_path):
    path = save(tmp_path / "a.pth", {"module.x": torch.ones(1), "y": torch.ones(1)})
    assert read_state_dict(path).keys() == {"module.x", "y"}


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"gone\.pth: there is no such file"):
        read_state_dict(tmp_path / "gone.pth")


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.98])
@pytest.mark.parametrize("name", ["a.pth", "old.pth", "a.safetensors"])
def test_truncated_file(tmp_path, state, keep, name):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name == "a.pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=rf"{name} is damaged or not whole"):
        read_state_dict(path)


def test_noise_is_damaged(tmp_path):
    path = tmp_path / "noise.pth"
    path.write_bytes(hashlib.sha256(b"noise").digest() * 100)
    with pytest.raises(UserError, match="damaged"):
        read_state_dict(path)


@pytest.mark.parametrize("page", ["<!DOCTYPE html><html></html>", "\n<html>404</html>"])
def test_web_page_saved_as_checkpoint(tmp_path, page):
    path = tmp_path / "sam.pth"
    path.write_text(page)
    with pytest.raises(UserError, match=r"sam\.pth is a web page"):
        read_state_dict(path)


def test_git_lfs_pointer(tmp_path):
    path = tmp_path / "sam.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        read_state_dict(path)


class Payload:
    """What an attacker would pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return subprocess.call, (["touch", str(self.path)],)


@pytest.mark.parametrize("new_format", [True, False])
def test_nothing_in_a_file_is_executed(tmp_path, new_format):
    path, proof = tmp_path / "evil.pth", tmp_path / "proof"
    torch.save({"x": Payload(proof)}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError, match=r"evil\.pth holds more than tensors"):
        read_state_dict(path)
    assert not proof.exists()


@pytest.mark.parametrize("content", [[1, 2], {}, torch.ones(2), {"model": 3}])
def test_not_a_dict_of_tensors(tmp_path, content):
    with pytest.raises(UserError, match="no checkpoint"):
        read_state_dict(save(tmp_path / "a.pth", content))


def test_entry_that_is_no_tensor_is_named(tmp_path):
    path = save(tmp_path / "a.pth", {"x": torch.ones(1), "lr": 0.1})
    with pytest.raises(UserError, match="'lr' is not a tensor"):
        read_state_dict(path)


# Loading


def test_all_tensors_are_loaded(tmp_path, tiny, state):
    sam = build_sam(tiny)
    report = load_base(sam, save(tmp_path / "a.pth", state))
    assert set(report.loaded) == set(state) and not (report.resized or report.new or report.unused)
    assert all(torch.equal(sam.state_dict()[name], state[name]) for name in state)
    assert f"{len(state)} tensors loaded, 0 resized" in report.summary()


def test_tensors_of_the_file_alone_are_reported(tmp_path, tiny, state):
    state["image_encoder.extra"] = torch.ones(1)
    report = load_base(build_sam(tiny), save(tmp_path / "a.pth", state))
    assert report.unused == ("image_encoder.extra",)
    assert "1 unused (image_encoder.extra" in report.summary()


@pytest.mark.parametrize("image_size", [(96, 96), (48, 48), (48, 80), (96, 32)])
def test_positions_are_resized_to_another_image_size(tmp_path, tiny, state, image_size):
    sam, (rows, columns) = build_sam(tiny, image_size), (side // 16 for side in image_size)
    report = load_base(sam, save(tmp_path / "a.pth", state))
    blocks = "image_encoder.blocks"
    tables = {f"{blocks}.1.attn.rel_pos_h", f"{blocks}.1.attn.rel_pos_w"}  # 1 is global, 0 not
    assert set(report.resized) == {"image_encoder.pos_embed", *tables}
    assert set(report.loaded) | set(report.resized) == set(state)
    loaded = sam.state_dict()
    expected = resize_pos_embed(state["image_encoder.pos_embed"], (rows, columns))
    assert torch.equal(loaded["image_encoder.pos_embed"], expected)
    for name, length in (
        (f"{blocks}.1.attn.rel_pos_h", rows),
        (f"{blocks}.1.attn.rel_pos_w", columns),
    ):
        assert torch.equal(loaded[name], resize_rel_pos(state[name], 2 * length - 1))
    window = f"{blocks}.0.attn.rel_pos_h"
    assert torch.equal(loaded[window], state[window])


@pytest.mark.parametrize("image_size", [(96, 96), (48, 80)])
def test_resized_tables_give_what_stock_resizes_on_the_fly(tmp_path, tiny, state, image_size):
    path = save(tmp_path / "a.pth", state)
    small, large = build_sam(tiny), build_sam(tiny, image_size)
    load_base(small, path), load_base(large, path)
    small.image_encoder.pos_embed.data = large.image_encoder.pos_embed.data
    image = torch.randn(1, 3, *image_size)
    with torch.no_grad():
        on_the_fly, stored = small.image_encoder(image), large.image_encoder(image)
    assert torch.allclose(on_the_fly, stored, atol=1e-5)


def test_a_window_table_of_another_length_is_no_image_size(tmp_path, tiny, state):
    name = "image_encoder.blocks.0.attn.rel_pos_h"
    state[name] = torch.randn(9, state[name].shape[1])
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.rel_pos_h has shape \(9, 16\)"):
        load_base(build_sam(tiny), save(tmp_path / "a.pth", state))


def test_missing_tensor_is_named(tmp_path, tiny, state):
    del state["mask_decoder.iou_token.weight"]
    with pytest.raises(UserError, match=r"1 tensors are missing, first mask_decoder\.iou_token"):
        load_base(build_sam(tiny), save(tmp_path / "a.pth", state))


def test_another_model_type_is_guessed(tmp_path, tiny, monkeypatch):
    wide = replace(tiny, embed_dim=48, num_heads=3)
    monkeypatch.setitem(MODEL_TYPES, "wide", wide)
    path = save(tmp_path / "a.pth", build_sam(wide).state_dict())
    with pytest.raises(UserError, match=r"add --model_type wide, or choose another --checkpoint"):
        load_base(build_sam(tiny), path)


def test_a_deeper_model_is_not_loaded_in_part(tmp_path, tiny):
    path = save(tmp_path / "a.pth", build_sam(replace(tiny, depth=3)).state_dict())
    with pytest.raises(UserError, match=r"another size \(width 32, 3 blocks\)"):
        load_base(build_sam(tiny), path)


def test_a_checkpoint_of_something_else(tmp_path, tiny):
    path = save(tmp_path / "resnet.pth", {"conv1.weight": torch.ones(1)})
    with pytest.raises(UserError, match=r"resnet\.pth is no SAM checkpoint"):
        load_base(build_sam(tiny), path)


# Finding and fetching


@pytest.fixture
def server(tmp_path, monkeypatch, tiny):
    """The tiny type's official file, served on this machine."""
    content = hashlib.sha256(b"weights").digest() * 100_000

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/sam_tiny.pth"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(content) if found else 0))
            self.end_headers()
            self.wfile.write(content if found else b"")

        def log_message(self, *_):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{listening.server_port}/sam_tiny.pth"

    def offer(**changes):
        row = {"file": "sam_tiny.pth", "url": url, "sha256": hashlib.sha256(content).hexdigest()}
        monkeypatch.setitem(MODEL_TYPES, "tiny", replace(tiny, **(row | changes)))
        return content

    yield offer
    listening.shutdown()
    listening.server_close()


def test_none_and_types_without_a_file_start_from_random_weights(tmp_path):
    assert find_checkpoint(ModelOptions(model_type="vit_b", checkpoint="none"), tmp_path) is None
    assert find_checkpoint(ModelOptions(model_type="vit_mini"), tmp_path) is None


def test_a_given_or_official_file_is_found(tmp_path):
    official = tmp_path / MODEL_TYPES["vit_b"].file
    official.touch()
    assert find_checkpoint(ModelOptions(model_type="vit_b"), tmp_path) == official
    own = tmp_path / "own.pth"
    own.touch()
    options = ModelOptions(model_type="vit_b", checkpoint=str(own))
    assert find_checkpoint(options, tmp_path) == own


def test_a_given_file_that_is_not_there(tmp_path):
    options = ModelOptions(model_type="vit_b", checkpoint=str(tmp_path / "own.pth"), download=True)
    with pytest.raises(UserError, match=r"--checkpoint .*own\.pth: there is no such file"):
        find_checkpoint(options, tmp_path)


@pytest.mark.parametrize("checkpoint", ["auto", "{}/sam_vit_b_01ec64.pth"])
def test_missing_official_file_says_what_to_put_where(tmp_path, checkpoint):
    options = ModelOptions(model_type="vit_b", checkpoint=checkpoint.format(tmp_path))
    with pytest.raises(UserError) as error:
        find_checkpoint(options, tmp_path)
    message = str(error.value)
    assert str(tmp_path / "sam_vit_b_01ec64.pth") in message and "--download" in message
    assert MODEL_TYPES["vit_b"].url in message and "\n" not in message


def test_download(tmp_path, server):
    content = server()
    folder = tmp_path / "new" / "folder"
    path = find_checkpoint(ModelOptions(model_type="tiny", download=True), folder)
    assert path.read_bytes() == content and list(folder.iterdir()) == [path]
    assert file_sha256(path) == MODEL_TYPES["tiny"].sha256


def test_download_with_another_digest_leaves_nothing(tmp_path, server):
    server(sha256="0" * 64)
    with pytest.raises(UserError, match="did not arrive whole"):
        find_checkpoint(ModelOptions(model_type="tiny", download=True), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.pth", "http://localhost:9/x.pth"])
def test_download_without_network_is_one_line(tmp_path, server, url):
    server(url=url)
    with pytest.raises(UserError, match=r"could not be fetched .*put sam_tiny\.pth") as error:
        find_checkpoint(ModelOptions(model_type="tiny", download=True), tmp_path)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_download_of_a_file_that_is_gone(tmp_path, server):
    server()
    server(url=MODEL_TYPES["tiny"].url.replace("sam_tiny", "gone"))
    with pytest.raises(UserError, match=r"could not be fetched \(HTTP Error 404"):
        find_checkpoint(ModelOptions(model_type="tiny", download=True), tmp_path)
    assert list(tmp_path.iterdir()) == []
