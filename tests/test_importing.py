"""Files of others: what is refused and how, what is said, and the verbs as a user types them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything.modeling import Sam

from samtune import config as c
from samtune.adapters import ADAPTERS, build_model
from samtune.adapters.options import (
    AdaptFormerOptions,
    ConvLoraOptions,
    DecoderOptions,
    LoraOptions,
    SamAdapterOptions,
)
from samtune.engine.distributed import Process
from samtune.errors import UserError
from samtune.importing import run as import_weights
from samtune.models import MODEL_TYPES
from samtune.models.sam import build_sam
from samtune.structures import Prompts
from samtune.trained import load_trained

ROOT = Path(__file__).resolve().parents[1]
ALONE = Process(0, 1, 0, torch.device("cpu"))


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """A small SAM with base weights, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    row = replace(
        MODEL_TYPES["vit_mini"], embed_dim=32, depth=2, num_heads=2, global_blocks=(1,),
        image_size=64, window_size=3, prompt_embed_dim=32, decoder_heads=4, decoder_mlp_dim=32,
        iou_head_hidden_dim=16,
    )  # fmt: skip
    monkeypatch.setitem(MODEL_TYPES, "tiny", row)
    torch.manual_seed(0)
    torch.save(build_sam(row).state_dict(), "base.pth")


def tuned(adapter: str, options, num_classes: int = 1, layout: str = "samed", **model):
    """A model as somebody else trained it: everything of it lies elsewhere than the base."""
    asked = c.ModelOptions(**{"model_type": "tiny", "adapter": adapter} | model)
    asked = replace(asked, class_layout=layout)
    made = build_model(asked, options, "none", None, 5, num_classes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return made


def config(adapter: str, options, num_classes: int = 1, prompt: str = "none", **model):
    asked = {"model_type": "tiny", "adapter": adapter, "checkpoint": "base.pth"} | model
    return c.ImportConfig(
        c.ImportOptions("theirs.pth"), c.ModelOptions(**asked),
        c.ReadOptions(num_classes=num_classes), c.PromptOptions(prompt=prompt),
        c.RunOptions(output_dir="run"), options,
    )  # fmt: skip


def table() -> list[list[str]]:
    return [line.split("\t") for line in Path("run/import.txt").read_text().splitlines()[1:]]


def test_every_tensor_is_told_of(capsys):
    """Those of the file, and those of ours that it does not hold."""
    model = tuned("sam_adapter", SamAdapterOptions(tune_out=12, hidden_dim=6))
    base = torch.load("base.pth", weights_only=True)
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("prompt_encoder.")}
    equal = "image_encoder.neck.0.weight"
    state[equal] = base[equal]
    up = "image_encoder.task_adapter_up.bias"
    alias = "image_encoder.task_adapter_blocks.0.up_projection.bias"
    state[alias] = state[up]
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, "theirs.pth")
    import_weights(config("sam_adapter", SamAdapterOptions()), ALONE)
    rows = {key: (name, fate) for key, name, fate in table() if key != "-"}
    assert rows.keys() == state.keys()
    assert rows[up] == (up, "loaded, new") and rows[alias] == (up, "the same tensor again")
    assert rows[equal] == (equal, "loaded, equal to the base's")
    changed = "mask_decoder.mask_tokens.weight"
    assert rows[changed] == (changed, "loaded, not the base's")
    absent = {name: fate for key, name, fate in table() if key == "-"}
    assert absent.keys() == {n for n in base if n.startswith("prompt_encoder.")}
    assert set(absent.values()) == {"not in the file: the base's"}
    said = capsys.readouterr().out
    assert "1 the same tensor again" in said and "run/import.txt" in said
    ours = load_trained("run").state_dict()
    assert all(torch.equal(t, ours[n]) for n, t in state.items() if n != alias)


FULL = [
    ("decoder", DecoderOptions()),
    ("sam_adapter", SamAdapterOptions(variant="official")),
    ("lora", LoraOptions(rank=3)),
    ("lora", LoraOptions(form="gsam")),
    ("conv_lora", ConvLoraOptions(rank=2, experts=3)),
    ("conv_lora", ConvLoraOptions(form="gsam")),
    ("adaptformer", AdaptFormerOptions(bottleneck=5)),
    ("adaptformer", AdaptFormerOptions(form="gsam")),
]


@pytest.mark.parametrize(("adapter", "options"), FULL)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_whole_model_needs_no_base_and_no_flag_that_it_shows(adapter, options, suffix):
    """Form and sizes are those of the file, here with the default of every flag of the adapter."""
    from safetensors.torch import save_file

    model = tuned(adapter, options, num_classes=5, layout="gsam", image_size=96)
    state = model.state_dict()
    if suffix == "pth":
        torch.save(state, "theirs.pth")
    else:
        save_file({n: t.clone().contiguous() for n, t in state.items()}, "theirs.safetensors")
    asked = config(adapter, ADAPTERS[adapter].options(), 5, checkpoint="none")
    source = c.ImportOptions(f"theirs.{suffix}")
    import_weights(replace(asked, source=source), ALONE)
    image = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)
    again = load_trained("run")
    with torch.no_grad():
        assert torch.equal(again(image).logits, model(image).logits)
    assert again.image_size == (96, 96)


@pytest.mark.parametrize(
    ("held", "layout", "asked", "prompt", "said"),
    [
        (5, "gsam", 1, "none", "answers with 5 masks.* --num_classes 5 --prompt none"),
        (5, "samed", 7, "none", "answers with 5 masks.*not --num_classes 7.* --num_classes 5"),
        (5, "samed", 5, "box", "answers with 5 masks.*under --prompt box: .* --prompt none"),
        (1, "samed", 2, "none", "answers with one mask.* add --num_classes 1$"),
    ],
)
def test_another_number_of_classes_is_one_sentence(held, layout, asked, prompt, said):
    torch.save(tuned("decoder", DecoderOptions(), held, layout).state_dict(), "theirs.pth")
    with pytest.raises(UserError, match=said):
        import_weights(config("decoder", DecoderOptions(), asked, prompt), ALONE)
    assert not Path("run").exists()


def test_four_classes_and_sams_own_four_masks_look_alike():
    """The flag decides."""
    for classes in (1, 4):
        torch.save(tuned("decoder", DecoderOptions(), classes).state_dict(), "theirs.pth")
        asked = config("decoder", DecoderOptions(), classes)
        import_weights(replace(asked, run=c.RunOptions(output_dir=f"run{classes}")), ALONE)
        image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
        assert load_trained(f"run{classes}")(image).logits.shape[1] == classes


def test_another_adapter_size_or_model_is_named():
    torch.save(tuned("lora", LoraOptions(rank=3)).state_dict(), "theirs.pth")
    with pytest.raises(UserError, match=r"theirs\.pth holds what --adapter lora has"):
        import_weights(config("decoder", DecoderOptions()), ALONE)
    with pytest.raises(UserError, match="made with --rank 3, --rank 9 does not fit"):
        import_weights(config("lora", LoraOptions(rank=9)), ALONE)
    with pytest.raises(UserError, match="frames of 64 px, --image_size 96 does not fit"):
        import_weights(config("lora", LoraOptions(), image_size=96), ALONE)
    with pytest.raises(UserError, match="another size of SAM than vit_b: add --model_type tiny"):
        import_weights(config("lora", LoraOptions(), model_type="vit_b"), ALONE)
    with pytest.raises(UserError, match="--weights is not set"):
        nameless = replace(config("lora", LoraOptions()), source=c.ImportOptions())
        import_weights(nameless, ALONE)
    assert not Path("run").exists()


def test_a_part_of_a_model_needs_a_base():
    state = tuned("lora", LoraOptions()).state_dict()
    part = {n: t for n, t in state.items() if "linear_" in n or n.startswith("mask_decoder.")}
    torch.save(part, "theirs.pth")
    with pytest.raises(UserError, match=r"lacks .* of the model's tensors.*: add --checkpoint"):
        import_weights(config("lora", LoraOptions(), checkpoint="none"), ALONE)
    import_weights(config("lora", LoraOptions()), ALONE)


def test_one_name_with_two_tensors_is_refused():
    """Names of the same tensor must hold the same values."""
    state = tuned("sam_adapter", SamAdapterOptions(tune_out=12, hidden_dim=6)).state_dict()
    alias = "image_encoder.task_adapter_blocks.0.up_projection.bias"
    state[alias] = state["image_encoder.task_adapter_up.bias"] + 1
    torch.save(state, "theirs.pth")
    with pytest.raises(UserError, match=r"two different tensors for image_encoder\.task_ad"):
        import_weights(config("sam_adapter", SamAdapterOptions()), ALONE)


# The real commands


def command(*argv: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "MASTER"))}
    done = subprocess.run(
        [sys.executable, str(ROOT / "code/run_sa.py"), *argv], text=True, timeout=600,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=kept | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def samed_file(num_classes: int) -> None:
    """A file as SAMed writes it for `vit_mini`, and base weights for it."""
    asked = c.ModelOptions(model_type="vit_mini", adapter="lora", image_size=64)
    torch.manual_seed(1)
    torch.save(build_sam("vit_mini", 64).state_dict(), "base.pth")
    made = build_model(asked, LoraOptions(rank=2), "none", None, 5, num_classes)
    file = {}
    for name, tensor in made.state_dict().items():
        place = name.split(".")
        if "linear_" in name:
            _, factor, part = place[5].split("_")
            value = tensor + 0.1 * torch.randn(tensor.shape)
            file[f"w_{factor}_{2 * int(place[2]) + 'qv'.index(part):03d}"] = value
        elif place[0] != "image_encoder":
            file[name] = tensor
    torch.save(file, "theirs.pth")


def test_the_commands_import_and_evaluate(tmp_path):
    """What is scored afterwards needs no flag but its images."""
    samed_file(num_classes=3)
    told = command(
        "import", "--weights", "theirs.pth", "--adapter", "lora", "--model_type", "vit_mini",
        "--checkpoint", "base.pth", "--image_size", "64", "--num_classes", "3", "--prompt", "none",
        "--normalisation", "unit", "--output_dir", "theirs",
    )  # fmt: skip
    assert "loaded, new" in told and "theirs/import.txt" in told
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        Path(folder).mkdir()
    for index in range(2):
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"images/{index}.png")
        ids = np.arange(40 * 48, dtype=np.uint8).reshape(40, 48) % 3
        Image.fromarray(ids).save(f"masks/{index}.png")
    scored = command("evaluate", "--run_dir", "theirs", "--test_image_dir", "images",
                     "--test_mask_dir", "masks", "--workers", "0")  # fmt: skip
    assert "2 test images" in scored and Path("theirs/scores.json").exists()


def test_the_commands_import_and_merge():
    """A plain SAM's file, with the answers of the imported model."""
    samed_file(num_classes=1)
    flags = ["--adapter", "lora", "--model_type", "vit_mini", "--checkpoint", "base.pth",
             "--image_size", "64", "--prompt", "none", "--output_dir", "theirs"]  # fmt: skip
    command("import", "--weights", "theirs.pth", *flags)
    told = command("merge", "--run_dir", "theirs", "--output", "merged.pth")
    assert "merged.pth" in told and "segment_anything" in told
    stock, model = build_sam("vit_mini", 64), load_trained("theirs")
    stock.load_state_dict(torch.load("merged.pth", weights_only=True))
    assert isinstance(stock, Sam)
    image = torch.rand(3, 64, 64) * 255
    asked = [{"image": image.byte().float(), "original_size": (64, 64)}]
    with torch.no_grad():
        answer = stock(asked, multimask_output=False)[0]["low_res_logits"]
        expected = model(image.byte()[None], Prompts()).logits
        stock.load_state_dict(torch.load("base.pth", weights_only=True), strict=False)
        untuned = stock(asked, multimask_output=False)[0]["low_res_logits"]
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(untuned, expected, rtol=1e-2, atol=1e-2)
