"""Files with published names, made from the fixtures' tensors, become runs with their outputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from check_gsam import STRIDE, Given, vit_of
from check_models import model_type
from check_multiclass import classes_of, decoder_sizes
from check_samus import SAM_PATCH
from check_ts_sam import blocks
from fixture import Fixture, close
from torchvision.models import resnet18

from samtune import config as c
from samtune.adapters import ADAPTERS, published
from samtune.adapters.options import SamAdapterOptions, TsSamOptions
from samtune.engine.checkpoint import read_metadata
from samtune.engine.distributed import Process
from samtune.importing import run
from samtune.models import MODEL_TYPES, NORMALISATIONS, ModelType, Stage
from samtune.models.mask_decoder import ClassDecoder, decode_masks
from samtune.models.sam import build_sam
from samtune.structures import Prompts
from samtune.trained import load_trained

ALONE = Process(0, 1, 0, torch.device("cpu"))
ENCODER = "image_encoder."


def pytest_generate_tests(metafunc):
    """Every fixture of a kind that the test's `kinds` mark names."""
    marks = list(metafunc.definition.iter_markers("kinds"))
    if not marks:
        return
    folder = Path(metafunc.config.getoption("--golden"))
    files = [
        pytest.param(path, id=path.stem)
        for path in sorted(folder.glob("*.json"))
        if json.loads(path.read_text()).get("kind") in marks[0].args
    ]
    if not files:
        skip = pytest.mark.skip(reason=f"no fixtures at {folder}")
        files = [pytest.param(None, id="absent", marks=skip)]
    metafunc.parametrize("path", files)


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Writes a file and its base, imports the one onto the other, and loads the run.

    Nothing but the run's folder is told to the second step.
    """
    monkeypatch.chdir(tmp_path)

    def make(row, file, adapter, base=None, prompt="none", num_classes=1, options=None, **model):
        monkeypatch.setitem(MODEL_TYPES, "golden", row)
        torch.save(file, "theirs.pth")
        if base is not None:
            torch.save(base, "base.pth")
        run(
            c.ImportConfig(
                c.ImportOptions("theirs.pth"),
                c.ModelOptions(
                    model_type="golden", adapter=adapter,
                    checkpoint="none" if base is None else "base.pth", **model,
                ),
                c.ReadOptions(num_classes=num_classes),
                c.PromptOptions(prompt=prompt),
                c.RunOptions(output_dir="run"),
                options or ADAPTERS[adapter].options(),
            ),
            ALONE,
        )  # fmt: skip
        return load_trained("run")

    return make


def random_sam(row: ModelType, seed: int = 3, num_classes: int = 1) -> dict:
    """A stock Sam's state of random values, none of them at a start that hides mistakes."""
    torch.manual_seed(seed)
    sam = build_sam(row)
    if num_classes > 1:
        sam.mask_decoder = ClassDecoder(sam.mask_decoder, num_classes)
    return {n: t + 0.1 * torch.randn(t.shape) for n, t in sam.state_dict().items()}


def rest_of(state: dict) -> dict:
    """All but the image encoder."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(ENCODER)}


def fates() -> dict[str, str]:
    """import.txt: what became of each tensor of the file."""
    lines = Path("run/import.txt").read_text().splitlines()[1:]
    return {key: fate for key, _, fate in (line.split("\t") for line in lines) if key != "-"}


# Whole models


@pytest.mark.kinds("prompt_free_sam_binary", "prompt_free_sam_multiclass")
def test_gsams_plain_sam(path, imported):
    """Both layouts of the decoder, with DataParallel's prefix; K and layout are found again."""
    fixture = Fixture(path)
    vit, classes = fixture.config["vit"], classes_of(fixture.config)
    sizes = {k: v for k, v in vit.items() if k != "batch"}
    row = replace(model_type(sizes), **decoder_sizes(fixture.config, fixture))
    file = {f"module.{name}": tensor for name, tensor in fixture.group("param.").items()}
    model = imported(row, file, "decoder", random_sam(row), num_classes=classes,
                     normalisation="gsam")  # fmt: skip
    logits = model.decode(model.image_encoder(fixture["input.image"])).logits
    close(logits, fixture["output.low_res"], 1e-5, "low_res")
    known = read_metadata("run/best.safetensors")
    assert known["config"]["num_classes"] == classes and known["config"]["prompt"] == "none"
    assert (known["config"]["class_layout"] == "gsam") == (classes > 1)
    assert known["image_size"] == known["config"]["image_size"] == vit["img_size"]
    mean = model.pixel_mean.flatten().tolist()
    assert mean == pytest.approx(NORMALISATIONS["gsam"][0])


@pytest.mark.kinds("gsam_model_binary", "gsam_model_multiclass")
def test_gsam(path, imported):
    """With its ResNet under both names, the end that nothing reads, and DataParallel's prefix."""
    fixture = Fixture(path)
    config, vit = fixture.config, fixture.config["vit"]
    if vit["rel_pos_grid"] * STRIDE != ADAPTERS["gsam"].image_size:
        pytest.skip("made for another nominal size than the published one")
    row = vit_of(vit, **decoder_sizes(config, fixture))
    trunk, cnn = resnet18().state_dict(), ENCODER + "cnn_embed."
    file = fixture.group("param.") | {f"{cnn}backbone.{n}": t for n, t in trunk.items()}
    for name, tensor in trunk.items():
        part, _, rest = name.partition(".")
        if part not in ("layer4", "fc"):
            short = f"res{int(part[-1]) + 1}" if part.startswith("layer") else part
            file[f"{cnn}{short}.{rest}"] = tensor
    file[f"{cnn}conv_f.weight"] = torch.randn(vit["embed_dim"], 256, 1, 1)
    file = {f"module.{name}": tensor for name, tensor in file.items()}
    model = imported(row, file, "gsam", random_sam(row), num_classes=classes_of(config),
                     normalisation="gsam")  # fmt: skip
    stem = model.image_encoder.cnn_embed.conv1.weight
    assert torch.equal(stem, trunk["conv1.weight"])
    model.image_encoder.cnn_embed = Given(fixture["input.cnn_feat"])
    logits = model.decode(model.image_encoder(fixture["input.image"])).logits
    close(logits, fixture["output.low_res"], 5e-5, "low_res")
    told = fates()
    assert told["image_encoder.cnn_embed.backbone.fc.weight"] == "read by nothing"
    spelt = [told[f"{cnn}{n}.weight"] for n in ("conv1", "backbone.conv1")]
    assert sorted(spelt) == ["loaded, new", "the same tensor again"]
    assert len(told) == len(file)


@pytest.mark.kinds("ts_sam", "ts_sam_nofft")
def test_ts_sam(path, imported):
    """A full state dict; with what SAM-Adapter, from which it grew, has beside, to be left out."""
    fixture = Fixture(path)
    config = fixture.config
    row = replace(model_type(config), decoder_heads=1)
    file = fixture.group("param.")
    file["pe_layer.positional_encoding_gaussian_matrix"] = torch.randn(2, 8)
    options = TsSamOptions(
        csa_blocks=blocks(config["csa_block_indice"]), mrm_blocks=blocks(config["mrm_block_indice"])
    )
    model = imported(row, file, "ts_sam", random_sam(row), options=options)
    logits = model.decode(model.image_encoder(fixture["input.image"])).logits
    close(logits, fixture["output.low_res_logits"], 1e-5, "low_res_logits")
    known = read_metadata("run/best.safetensors")["config"]
    assert (known["use_fft"], known["scale_factor"]) == (config["use_fft"], config["scale_factor"])
    assert fates()["pe_layer.positional_encoding_gaussian_matrix"] == "read by nothing"


@pytest.mark.kinds("sam_adapter_official_full")
def test_official_sam_adapter(path, imported):
    """Its own random frequencies win over the base's and stay, though nothing trains them."""
    fixture = Fixture(path)
    row = model_type(fixture.config)
    base = random_sam(row)
    model = imported(row, fixture.group("param."), "sam_adapter", base)
    logits = model.decode(model.image_encoder(fixture["input.image"])).logits
    close(logits, fixture["output.low_res_logits"], 1e-5, "low_res_logits")
    name = "pe_layer.positional_encoding_gaussian_matrix"
    frequencies = model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    assert torch.equal(frequencies, fixture[f"param.{name}"])
    assert not torch.equal(frequencies, base[f"prompt_encoder.{name}"])
    assert read_metadata("run/best.safetensors")["config"]["variant"] == "official"


@pytest.mark.kinds("train_step_sam_adapter", "train_step_decoder_only")
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_parents_partial_files(path, prefix, imported):
    """Parameters that trained, no buffers; the base brings the rest."""
    fixture = Fixture(path)
    config = fixture.config
    row = model_type(config)
    whole = fixture.group("param.")
    adapter = "sam_adapter" if "tune_out" in config else "decoder"
    base = random_sam(row) | {n: t for n, t in whole.items() if not n.startswith("mask_decoder.")}
    trained = {n for n in whole if n.startswith("mask_decoder.") or f"grad.{n}" in fixture}
    base = {name: tensor for name, tensor in base.items() if name in random_sam(row)}
    file = {prefix + name: whole[name] for name in trained}
    model = imported(row, file, adapter, base, prompt="box")
    features = model.image_encoder(fixture["output.preprocessed"])
    boxes = Prompts(boxes=fixture["output.box_model"].float())
    close(model.decode(features, boxes).logits, fixture["output.low_res_logits"], 1e-5, "low_res")
    known = read_metadata("run/best.safetensors")["config"]
    if adapter == "sam_adapter":
        shown = SamAdapterOptions(tune_out=known["tune_out"], hidden_dim=known["hidden_dim"])
        assert shown == SamAdapterOptions("parent", config["tune_out"], config["hidden_dim"])


# Image encoders, before a decoder of random values


@pytest.mark.kinds(
    "lora_gsam_encoder", "conv_lora_gsam_encoder", "adaptformer_gsam_encoder",
    "adaptformer_original_encoder", "sm_adaptformer_encoder",
)  # fmt: skip
def test_encoders_of_gsam_and_adaptformer(path, imported):
    """The form is found by the names; the file's decoder is kept, too."""
    fixture = Fixture(path)
    row, adapter = small_decoder(model_type(fixture.config)), fixture.kind.split("_encoder")[0]
    adapter, _, form = adapter.rpartition("_")
    if fixture.kind.startswith("sm_"):
        adapter, form = "adaptformer", "spatial"
    file = {ENCODER + name: tensor for name, tensor in fixture.group("param.").items()}
    file |= (decoder := rest_of(random_sam(row, seed=4)))
    model = imported(row, file, adapter, random_sam(row), normalisation="gsam")
    close(model.image_encoder(fixture["input.image"]), fixture["output.out"], 1e-5, "out")
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in decoder.items())
    assert read_metadata("run/best.safetensors")["config"]["form"] == form


@pytest.mark.kinds("conv_lora_autogluon_encoder")
@pytest.mark.parametrize("names", ["sam", "hugging face"])
def test_conv_lora_of_autogluon(path, names, imported):
    """Under SAM's names, and under those of Hugging Face's SamModel, which autogluon has."""
    fixture = Fixture(path)
    row = small_decoder(model_type(fixture.config))
    file = {ENCODER + name: tensor for name, tensor in fixture.group("param.").items()}
    file |= (decoder := rest_of(random_sam(row, seed=4)))
    if names != "sam":
        file = {f"model.{to_hugging_face(name)}": tensor for name, tensor in file.items()}
        shared = "model.prompt_encoder.shared_embedding.positional_embedding"
        file["model.shared_image_embedding.positional_embedding"] = file[shared]
    model = imported(row, file, "conv_lora", random_sam(row))
    close(model.image_encoder(fixture["input.image"]), fixture["output.out"], 1e-5, "out")
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in decoder.items())


def to_hugging_face(name: str) -> str:
    """SAM's name -> SamModel's, by the replacements of its converter (transformers 09cb93d)."""
    for ours, theirs in (
        ("iou_prediction_head.layers.0", "iou_prediction_head.proj_in"),
        ("iou_prediction_head.layers.1", "iou_prediction_head.layers.0"),
        ("iou_prediction_head.layers.2", "iou_prediction_head.proj_out"),
        ("mask_decoder.output_upscaling.0", "mask_decoder.upscale_conv1"),
        ("mask_decoder.output_upscaling.1", "mask_decoder.upscale_layer_norm"),
        ("mask_decoder.output_upscaling.3", "mask_decoder.upscale_conv2"),
        ("mask_downscaling.0", "mask_embed.conv1"),
        ("mask_downscaling.1", "mask_embed.layer_norm1"),
        ("mask_downscaling.3", "mask_embed.conv2"),
        ("mask_downscaling.4", "mask_embed.layer_norm2"),
        ("mask_downscaling.6", "mask_embed.conv3"),
        ("point_embeddings", "point_embed"),
        ("pe_layer.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
        ("image_encoder", "vision_encoder"),
        ("neck.0", "neck.conv1"),
        ("neck.1", "neck.layer_norm1"),
        ("neck.2", "neck.conv2"),
        ("neck.3", "neck.layer_norm2"),
        ("patch_embed.proj", "patch_embed.projection"),
        (".norm", ".layer_norm"),
        ("blocks", "layers"),
    ):
        name = name.replace(ours, theirs)
    if "output_hypernetworks_mlps" in name:
        for ours, theirs in (("layers.0", "proj_in"), ("layers.1", "layers.0"),
                             ("layers.2", "proj_out")):  # fmt: skip
            if ours in name:
                return name.replace(ours, theirs)
    return name


@pytest.mark.kinds("lora_samed_encoder")
def test_samed(path, imported):
    """Low-rank terms, counted through, and the rest of SAM but for its encoder: the base's."""
    fixture = Fixture(path)
    row, rank = small_decoder(model_type(fixture.config)), fixture.config["rank"]
    base, file = random_sam(row), rest_of(random_sam(row, seed=4, num_classes=6))
    for name, tensor in fixture.group("param.").items():
        place = name.split(".")
        if "linear_" in name:
            _, factor, part = place[4].split("_")
            file[f"w_{factor}_{2 * int(place[1]) + 'qv'.index(part):03d}"] = tensor
        else:
            base[ENCODER + name.replace("qkv.qkv", "qkv")] = tensor
    model = imported(row, file, "lora", base, num_classes=6, normalisation="unit")
    close(model.image_encoder(fixture["input.image"]), fixture["output.out"], 1e-5, "out")
    state = model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in file.items() if not n.startswith("w_"))
    assert read_metadata("run/best.safetensors")["config"]["rank"] == rank
    assert model.image_encoder(fixture["input.image"]).isfinite().all()


@pytest.mark.kinds("multiclass_decoder_samed")
def test_the_decoder_of_samed(path, imported):
    fixture = Fixture(path)
    sizes = ModelType(
        embed_dim=16, depth=2, num_heads=2, global_blocks=(1,), image_size=64, window_size=2,
        prompt_embed_dim=fixture.config["transformer_dim"],
        **decoder_sizes(fixture.config, fixture),
    )  # fmt: skip
    file = {n: t for n, t in random_sam(sizes).items() if n.startswith("prompt_encoder.")}
    file |= {f"mask_decoder.{n}": t for n, t in fixture.group("param.").items()}
    for index in range(2 * sizes.depth):
        file |= {f"w_a_{index:03d}": torch.randn(4, 16), f"w_b_{index:03d}": torch.randn(16, 4)}
    classes = fixture.config["masks_returned"]
    model = imported(sizes, file, "lora", random_sam(sizes), num_classes=classes)
    inputs = ("image_embeddings", "image_pe", "dense_prompt_embeddings")
    features, pe, dense = (fixture[f"input.{name}"] for name in inputs)
    sparse = features.new_zeros(len(features), 0, features.shape[1])
    masks, _ = decode_masks(model.mask_decoder, features, pe, sparse, dense)
    close(masks, fixture["output.masks"], 1e-5, "masks")


@pytest.mark.kinds("samus_encoder")
def test_samus(path, imported):
    """The whole file of a fixed 256 px; the CNN's width is found."""
    fixture = Fixture(path)
    config = fixture.config
    table = fixture["param.pos_embed"].shape[1]
    sizes = {**config, "img_size": table * SAM_PATCH, "patch_size": SAM_PATCH}
    row = small_decoder(model_type(sizes))
    file = {ENCODER + name: tensor for name, tensor in fixture.group("param.").items()}
    file |= rest_of(random_sam(row, seed=4))
    model = imported(row, file, "samus", random_sam(row))
    close(model.image_encoder(fixture["input.image"]), fixture["output.out"], 1e-5, "out")
    known = read_metadata("run/best.safetensors")
    assert known["config"]["cnn_width"] == config["cnn_width"]
    assert known["image_size"] == config["img_size"]


@pytest.mark.kinds("tiny_vit")
def test_mobile_sam(path, imported):
    """A whole SAM with TinyViT needs no base; its classifier, which nothing reads, is left out."""
    fixture = Fixture(path)
    config = fixture.config
    names = ("embed_dims", "depths", "num_heads", "window_sizes")
    stages = tuple(Stage(*row) for row in zip(*(config[name] for name in names), strict=True))
    row = ModelType(
        embed_dim=stages[-1].width, depth=sum(config["depths"]), num_heads=stages[-1].heads,
        global_blocks=(), backbone="tiny_vit", stages=stages, mlp_ratio=config["mlp_ratio"],
        image_size=112, prompt_embed_dim=len(fixture["param.neck.1.weight"]), decoder_mlp_dim=16,
        iou_head_hidden_dim=8,
    )  # fmt: skip
    file = random_sam(row, seed=4)  # for the counters of batches, which the fixture leaves out
    file |= {ENCODER + name: tensor for name, tensor in fixture.group("param.").items()}
    file |= {f"{ENCODER}{n}.weight": torch.ones(4, 4) for n in ("norm_head", "head")}
    model = imported(row, file, "decoder")
    features = model.image_encoder(fixture["input.image"])
    tolerance = fixture.json["tolerance"]["eval"]
    torch.testing.assert_close(features, fixture["output.eval.neck"], **tolerance)
    assert fates()["image_encoder.head.weight"] == "read by nothing"


def small_decoder(row: ModelType) -> ModelType:
    return replace(row, decoder_heads=2, decoder_mlp_dim=16, iou_head_hidden_dim=8)


# Names alone

METHODS = {
    "SAM": ("decoder", {}),
    "SAM_LoRA": ("lora", {"form": "gsam"}),
    "SAM_ConvLoRA": ("conv_lora", {"form": "gsam"}),
    "SAM_AdaptFormer": ("adaptformer", {"form": "gsam"}),
    "SAM_SMAdaptFormer": ("adaptformer", {"form": "spatial"}),
    "SAMUS": ("samus", {}),
    "GSAM": ("gsam", {}),
}


@pytest.mark.parametrize("method", METHODS)
def test_gsams_methods_are_told_apart(golden_dir, method):
    keys = json.loads((golden_dir / "gsam_state_dict_keys.json").read_text())
    shapes = dict(keys["SAM"])
    if method != "SAM":
        gone = keys[method]["removed"]
        shapes = {n: s for n, s in shapes.items() if n not in gone}
        shapes |= keys[method]["added_or_reshaped"]
    assert published.made_by(shapes) == METHODS[method]
    assert published.classes_shown(shapes, 4) == ((1, ""), (4, "samed"))
    many = shapes | keys["decoder_num_classes_19"]
    assert published.classes_shown(many, 4) == ((19, "gsam"),)
    row, size = MODEL_TYPES["vit_b"], {"SAMUS": (256, 256), "GSAM": (256, 256)}
    stride = ADAPTERS[METHODS[method][0]].stride
    assert published.frame_shown(shapes, row, stride) == size.get(method, (1024, 1024))
