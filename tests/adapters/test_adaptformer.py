"""What the fixtures of AdaptFormer do not show."""

import pytest
import torch
from torch import nn

from samtune.adapters import ADAPTERS
from samtune.adapters.adaptformer import OriginalAdapter, adapt_block
from samtune.adapters.bottleneck import SpatialMultiscaleAdapter
from samtune.adapters.options import AdaptFormerOptions
from samtune.errors import UserError
from samtune.models.sam import build_image_encoder, build_sam

FORMS = ("original", "gsam", "spatial")
UNREAD = 132_612 + 419_424  # IoU head and three hyper-networks of the decoder, frozen here
DECODER = 4_058_340


def options_of(form: str, **values) -> AdaptFormerOptions:
    return AdaptFormerOptions(form, bottleneck=4, **values)


# Adapter parameters by hand: depth x (C m + m + m C + C), m = 64 or C / 4, and for spatial, per
# block, four 3 x 3 and one 1 x 1 convolutions of m channels. vit_b as in the published tables.
COUNTS = {
    ("original", "vit_b"): 1_189_632,
    ("original", "vit_l"): 24 * (2 * 1024 * 64 + 64 + 1024),
    ("original", "vit_h"): 32 * (2 * 1280 * 64 + 64 + 1280),
    ("gsam", "vit_b"): 3_550_464,
    ("gsam", "vit_l"): 24 * (2 * 1024 * 256 + 256 + 1024),
    ("gsam", "vit_h"): 32 * (2 * 1280 * 320 + 320 + 1280),
    ("spatial", "vit_b"): 19_918_080,
    ("spatial", "vit_l"): 24 * (2 * 1024 * 256 + 256 + 1024 + 37 * 256**2),
    ("spatial", "vit_h"): 32 * (2 * 1280 * 320 + 320 + 1280 + 37 * 320**2),
}


@pytest.mark.parametrize(("form", "name"), COUNTS)
def test_parameter_counts(form, name):
    with torch.device("meta"):
        sam = build_sam(name).requires_grad_(False)
        model = ADAPTERS["adaptformer"].build(sam, AdaptFormerOptions(form))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == COUNTS[form, name] + DECODER - UNREAD


def test_published_names_and_shapes():
    with torch.device("meta"):
        for form in FORMS:
            sam = build_sam("vit_b").requires_grad_(False)
            stock = {name: tuple(tensor.shape) for name, tensor in sam.state_dict().items()}
            model = ADAPTERS["adaptformer"].build(sam, AdaptFormerOptions(form))
            state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            own = {f"image_encoder.blocks.{i}.{n}": s
                   for i in range(12) for n, s in PUBLISHED[form].items()}  # fmt: skip
            assert state == stock | own


PUBLISHED = {
    "original": {
        "adaptmlp.down_proj.weight": (64, 768),
        "adaptmlp.down_proj.bias": (64,),
        "adaptmlp.up_proj.weight": (768, 64),
        "adaptmlp.up_proj.bias": (768,),
    },
    "gsam": {
        "MLP_Adapter.D_fc1.weight": (192, 768),
        "MLP_Adapter.D_fc1.bias": (192,),
        "MLP_Adapter.D_fc2.weight": (768, 192),
        "MLP_Adapter.D_fc2.bias": (768,),
    },
}
PUBLISHED["spatial"] = PUBLISHED["gsam"] | {
    **{f"MLP_Adapter.aspp.convs.{i}.conv.weight": (192, 192, 3, 3) for i in range(4)},
    "MLP_Adapter.aspp.convs.4.conv.weight": (192, 192, 1, 1),
}


def test_published_start():
    torch.manual_seed(0)
    adapter = OriginalAdapter(1024, AdaptFormerOptions())
    weight = adapter.down_proj.weight
    assert weight.abs().max() <= 1024**-0.5 and weight.std().item() == pytest.approx(
        (3 * 1024) ** -0.5, rel=0.02
    )
    assert not any(p.any() for n, p in adapter.named_parameters() if n != "down_proj.weight")
    assert adapter.scale == 0.1 and adapter.dropout.p == 0.1


def test_a_learned_scale_is_one_number_per_block_under_the_published_name(tiny):
    sam = build_sam(tiny).requires_grad_(False)
    model = ADAPTERS["adaptformer"].build(sam, AdaptFormerOptions(learn_scale=True, scale=0.7))
    for block in model.image_encoder.blocks:
        scale = block.get_parameter("adaptmlp.scale")
        assert scale.requires_grad and scale.tolist() == [pytest.approx(0.7)]


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    adapter = OriginalAdapter(16, AdaptFormerOptions(dropout=0.5))
    nn.init.normal_(adapter.up_proj.weight)
    x = torch.randn(1, 16)
    assert not torch.equal(adapter(x), adapter(x))
    assert torch.equal(adapter.eval()(x), adapter(x))


class TinyVitBlock(nn.Module):
    """Stands in for timm's: the norm lies inside the MLP, which sees a row of tokens."""

    class NormMlp(nn.Module):
        def __init__(self, dim: int):
            super().__init__()
            self.norm, self.act = nn.LayerNorm(dim), nn.GELU()
            self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

        def forward(self, x):
            return self.fc2(self.act(self.fc1(self.norm(x))))

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = self.NormMlp(dim)

    def forward(self, x):
        return x + self.mlp(x)


@pytest.mark.parametrize("form", ["original", "gsam"])
def test_a_block_with_the_norm_in_its_mlp_is_adapted_the_same_way(form):
    torch.manual_seed(0)
    block, x = TinyVitBlock(16), torch.randn(2, 5, 16)
    names, expected = set(block.state_dict()), block(x)
    normal = block.mlp.norm(x)
    adapted = adapt_block(block, options_of(form, scale=0.25))
    assert names < set(adapted.state_dict())
    if form == "original":
        assert torch.allclose(adapted.eval()(x), expected, atol=1e-6)
        nn.init.normal_(adapted.mlp.adaptmlp.up_proj.weight)
        term = adapted.mlp.adaptmlp(x)
    else:
        term = 0.25 * adapted.mlp.MLP_Adapter(normal)
    assert torch.allclose(adapted.eval()(x), expected + term, atol=1e-6)


def test_the_spatial_form_needs_a_grid():
    with pytest.raises(UserError, match="--form spatial does not fit"):
        adapt_block(TinyVitBlock(16), options_of("spatial"))


def test_timm_blocks_too():
    tiny_vit = pytest.importorskip("timm.models.tiny_vit")
    torch.manual_seed(0)
    block, x = tiny_vit.TinyVitBlock(32, 2, 5).eval(), torch.randn(1, 7, 7, 32)
    expected = block(x)
    adapted = adapt_block(block, AdaptFormerOptions()).eval()
    assert torch.allclose(adapted(x), expected, atol=1e-6)
    assert not torch.allclose(adapt_block(block, AdaptFormerOptions("gsam"))(x), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_silent_adapter_is_the_stock_encoder(tiny, form):
    """In windows that do not divide the grid, and on the whole grid."""
    torch.manual_seed(0)
    encoder = build_image_encoder(tiny, 80).eval()
    image = torch.randn(1, 3, 80, 80)
    with torch.no_grad():
        expected = encoder(image)
        for index, block in enumerate(encoder.blocks):
            adapted = encoder.blocks[index] = adapt_block(block, options_of(form)).eval()
            last = adapted.adaptmlp.up_proj if form == "original" else adapted.MLP_Adapter.D_fc2
            nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        assert torch.allclose(encoder(image), expected, atol=1e-5)


def test_dilations_are_those_asked_for(tiny):
    sam = build_sam(tiny).requires_grad_(False)
    options = AdaptFormerOptions("spatial", dilations="2, 5")
    model = ADAPTERS["adaptformer"].build(sam, options)
    adapter = model.image_encoder.blocks[0].MLP_Adapter
    assert isinstance(adapter, SpatialMultiscaleAdapter)
    assert [branch.conv.dilation[0] for branch in adapter.aspp.convs] == [1, 2, 5, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"form": "gsam", "dropout": 0.2}, "--dropout means nothing with --form gsam"),
        ({"form": "spatial", "learn_scale": True}, "--learn_scale means nothing"),
        ({"dilations": "2,3"}, "--dilations means nothing with --form original"),
        ({"form": "spatial", "dilations": "2,x"}, "--dilations 2,x: write whole numbers"),
        ({"form": "spatial", "dilations": "0"}, "--dilations 0: write whole numbers"),
        ({"bottleneck": -1}, "--bottleneck -1"),
        ({"dropout": 1.0}, "--dropout 1.0"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        AdaptFormerOptions(**values)
