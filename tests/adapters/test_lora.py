"""What the fixtures of LoRA do not show: merging, TinyViT's order of channels, published files."""

from functools import partial

import pytest
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, Sam
from torch import nn

from samtune.adapters import ADAPTERS, build_model
from samtune.adapters.lora import LoRALinear, LoRAQKV, adapt_qkv
from samtune.adapters.options import ConvLoraOptions, LoraOptions
from samtune.config import ModelOptions
from samtune.engine.checkpoint import load_adapted
from samtune.errors import UserError
from samtune.models import ModelType
from samtune.models.anatomy import QkvLayout
from samtune.models.sam import build_mask_decoder, build_prompt_encoder, build_sam
from samtune.models.segmenter import PromptedSam
from samtune.structures import Prompts

FORMS = [
    LoraOptions(),
    LoraOptions(rank=3, alpha=5, targets="k"),
    LoraOptions(targets="v,q,k", adapt_decoder=True),
    LoraOptions(form="gsam"),
]
UNREAD = 132_612 + 419_424  # IoU head and three hyper-networks, frozen here


def build(options: LoraOptions, seed: int = 1, model_type: str = "tiny"):
    asked = ModelOptions(model_type=model_type, adapter="lora", train="adapter")
    return build_model(asked, options, "box", None, seed)


def tune(model: nn.Module) -> nn.Module:
    """Stand-in for training: every trainable parameter moves."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn(p.shape, generator=generator)
    return model


def unmodified_sam(sizes: ModelType) -> Sam:
    """A Sam of the package's own classes and nothing else."""
    encoder = ImageEncoderViT(
        img_size=sizes.image_size, embed_dim=sizes.embed_dim, depth=sizes.depth,
        num_heads=sizes.num_heads, out_chans=sizes.prompt_embed_dim, use_rel_pos=True,
        window_size=sizes.window_size, global_attn_indexes=sizes.global_blocks,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    grid = sizes.image_size // sizes.patch_size
    prompt_encoder = build_prompt_encoder(sizes, (grid, grid))
    return Sam(encoder, prompt_encoder, build_mask_decoder(sizes)).eval()


@pytest.mark.parametrize("options", FORMS)
def test_merged_weights_are_an_unmodified_sams(tiny, options):
    model = tune(build(options))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stock = unmodified_sam(tiny)
    stock.load_state_dict(ADAPTERS["lora"].merge(model))
    seeded = torch.Generator().manual_seed(4)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=seeded)
    box = torch.tensor([[5.0, 8, 40, 60]])
    asked = [{"image": image, "original_size": (64, 64), "boxes": box}]
    with torch.no_grad():
        expected = model(image[None], Prompts(boxes=box))
        answer = stock(asked, multimask_output=False)[0]
        plain = unmodified_sam(tiny)
        plain.load_state_dict(before, strict=False)
        unmerged = plain(asked, multimask_output=False)[0]
    torch.testing.assert_close(answer["low_res_logits"], expected.logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(unmerged["low_res_logits"], expected.logits, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("options", FORMS)
def test_merged_weights_are_a_stock_shaped_tiny_vits(tiny, options):
    """Whose q, k and v lie head by head; its attentions are made to weigh something."""
    torch.manual_seed(0)
    model = tune(build(options, model_type="tiny_t"))
    for name, tensor in model.image_encoder.state_dict().items():
        if name.endswith((".qkv.weight", ".proj.weight")):
            tensor.mul_(10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stock = build_sam("tiny_t")
    stock.load_state_dict(ADAPTERS["lora"].merge(model))
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    asked = Prompts(boxes=torch.tensor([[5.0, 8, 40, 60]]))
    with torch.no_grad():
        expected = model(image[None], asked).logits
        answer = PromptedSam(stock).eval()(image[None], asked).logits
        stock.load_state_dict(before, strict=False)
        unmerged = PromptedSam(stock).eval()(image[None], asked).logits
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(unmerged, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_merged_names_and_shapes_are_those_of_the_registry(name, options):
    with torch.device("meta"):
        model = ADAPTERS["lora"].build(build_sam(name).requires_grad_(False), options)
        wanted = sam_model_registry[name]().state_dict()
    merged = ADAPTERS["lora"].merge(model)
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in wanted.items()}


@pytest.mark.parametrize("form", ["original", "gsam"])
def test_what_cannot_be_merged_says_so(tiny, form):
    """Both forms choose or weigh their convolutions by what they read, so they are not linear."""
    options = ModelOptions(model_type="tiny", adapter="conv_lora")
    model = build_model(options, ConvLoraOptions(form), "box", None, 1)
    with pytest.raises(UserError, match="--adapter conv_lora cannot be merged"):
        ADAPTERS["conv_lora"].merge(model)


@pytest.mark.parametrize("options", FORMS)
def test_each_heads_q_k_v_together(options):
    """With its rows in TinyViT's order a projection gives the same q, k and v, adapted alike."""
    sams, tiny_vits, width = QkvLayout(3, False), QkvLayout(3, True), 12
    by_part, by_head = (nn.Linear(width, 3 * width).requires_grad_(False) for _ in range(2))
    for name, rows in by_part.state_dict().items():
        getattr(by_head, name).copy_(tiny_vits.join(sams.split(rows, dim=0), dim=0))
    one = tune(adapt_qkv(by_part, sams, options))
    two = tune(adapt_qkv(by_head, tiny_vits, options))
    terms = {n: t for n, t in one.state_dict().items() if n not in ("weight", "bias")}
    two.load_state_dict(terms, strict=False)
    x = torch.randn(2, 5, width)
    with torch.no_grad():
        expected, actual = sams.split(one(x)), tiny_vits.split(two(x))
    for part, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(part, wanted)


def test_parts_without_a_term_stay(tiny):
    stock = nn.Linear(8, 24)
    adapted = tune(LoRAQKV(stock.requires_grad_(False), QkvLayout(2, False), 2, 1.0, ["q", "v"]))
    x = torch.randn(4, 8)
    same = (adapted(x) == stock(x)).all(0)
    assert same[8:16].all() and not same[:8].any() and not same[16:].any()


def test_scale_is_alpha_over_rank():
    stock = nn.Linear(6, 6).requires_grad_(False)
    module = tune(LoRALinear(stock, 2, LoraOptions(rank=2, alpha=6).scale))
    x = torch.randn(5, 6)
    term = x @ module.linear_a.weight.T @ module.linear_b.weight.T
    torch.testing.assert_close(module(x), stock(x) + 3 * term)
    assert LoraOptions(rank=7).scale == 1


def test_decoder_terms_replace_its_transformers_training(tiny):
    decoder = build(LoraOptions(adapt_decoder=True)).mask_decoder
    trained = {n for n, p in decoder.transformer.named_parameters() if p.requires_grad}
    assert trained and all(".linear_" in name for name in trained)
    assert len(trained) == (3 * tiny.decoder_depth + 1) * 2 * 2  # attentions, q and v, A and B
    assert decoder.mask_tokens.weight.requires_grad


def samed_names(depth: int, decoder_depth: int) -> dict[str, str]:
    """Names in a SAMed file and whose tensors they are, spelled out."""
    names, blocks = {}, "image_encoder.blocks"
    for block in range(depth):
        for part, j in (("q", 2 * block), ("v", 2 * block + 1)):
            for m in "ab":
                names[f"w_{m}_{j:03d}"] = f"{blocks}.{block}.attn.qkv.linear_{m}_{part}.weight"
    transformer = "mask_decoder.transformer"
    kinds = {
        "sa": "self_attn", "cti": "cross_attn_token_to_image", "cit": "cross_attn_image_to_token"
    }  # fmt: skip
    for layer in range(decoder_depth):
        for short, kind in kinds.items():
            for part, j in (("q", 2 * layer), ("v", 2 * layer + 1)):
                for m in "ab":
                    names[f"{short}_{m}_{j:03d}"] = (
                        f"{transformer}.layers.{layer}.{kind}.{part}_proj.linear_{m}.weight"
                    )
    for part in "qv":
        for m in "ab":
            place = f"{transformer}.final_attn_token_to_image.{part}_proj"
            names[f"fati_{part}{m}"] = f"{place}.linear_{m}.weight"
    return names


@pytest.mark.parametrize("adapt_decoder", [False, True])
def test_a_samed_file_loads(tiny, tmp_path, adapt_decoder):
    options = LoraOptions(adapt_decoder=adapt_decoder)
    model, again = tune(build(options)), build(options)
    state = model.state_dict()
    names = {p: n for p, n in samed_names(tiny.depth, tiny.decoder_depth).items() if n in state}
    assert len(names) == 4 * tiny.depth + adapt_decoder * 4 * (3 * tiny.decoder_depth + 1)
    published = {p: state[n] for p, n in names.items()}
    published |= {
        n: tensor
        for n, tensor in state.items()
        if n.startswith(("prompt_encoder.", "mask_decoder."))
        and not (adapt_decoder and ".transformer." in n)
    }
    torch.save(published, tmp_path / "samed.pth")
    # No base checkpoint here: what such a file leaves to it counts as known.
    again.base_keys = frozenset(build_sam(tiny).state_dict())
    load_adapted(again, tmp_path / "samed.pth", ADAPTERS["lora"].renames)
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_samed_names_reach_the_deepest_encoder():
    row = dict(ADAPTERS["lora"].renames)
    assert row["^w_b_063$"] == "image_encoder.blocks.31.attn.qkv.linear_b_v.weight"


SAMED = {"vit_b": 147_456, "vit_l": 393_216, "vit_h": 655_360}
GSAM = {"vit_b": 73_728, "vit_l": 147_456, "vit_h": 307_200}


@pytest.mark.parametrize("name", SAMED)
@pytest.mark.parametrize(("form", "table"), [("samed", SAMED), ("gsam", GSAM)])
def test_parameter_counts(name, form, table):
    with torch.device("meta"):
        sam = build_sam(name).requires_grad_(False)
        model = ADAPTERS["lora"].build(sam, LoraOptions(form=form))
    own = sum(p.numel() for p in model.image_encoder.parameters() if p.requires_grad)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert own == table[name] and trainable == own + 4_058_340 - UNREAD


def test_published_starting_values():
    torch.manual_seed(0)
    stock, layout = nn.Linear(400, 1200), QkvLayout(4, False)
    pair = adapt_qkv(stock, layout, LoraOptions(rank=50))
    assert pair.linear_a_q.weight.abs().max().item() == pytest.approx(1 / 20, rel=0.01)
    assert not pair.linear_b_q.weight.any()
    headwise = adapt_qkv(stock, layout, LoraOptions(form="gsam")).lora_k  # d = 100, m = 25
    assert headwise.lora_A.abs().max().item() == pytest.approx(1 / 5, rel=0.01)
    assert not headwise.lora_B.any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"form": "gsam", "rank": 8}, "--rank means nothing with --form gsam"),
        ({"form": "gsam", "adapt_decoder": True}, "--adapt_decoder means nothing with --form gsam"),
        ({"rank": 0}, "--rank must be at least 1"),
        ({"targets": "q,o"}, "--targets q,o: expected some of q,k,v"),
        ({"targets": "q,q"}, "each once"),
        ({"targets": ""}, "--targets : expected some"),
    ],
)
def test_options_that_cannot_be(values, message):
    with pytest.raises(UserError, match=message):
        LoraOptions(**values)
