"""Attention and blocks against stock's: outputs, all gradients, what is kept, what is counted."""

import copy

import pytest
import torch
from segment_anything.modeling.image_encoder import Block as StockBlock
from segment_anything.modeling.transformer import TwoWayTransformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from samtune.models import relative_attention as fused
from samtune.models.attention import FORMS, Block, RelativeAttention
from samtune.models.mask_decoder import fuse_attention

# Float32 differs by the order of sums only; a wrong term would differ by about one.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def stock_block(window_size: int, dtype=torch.float64) -> StockBlock:
    """A block for a grid of 7 x 5, or windows of 4 that reach over its border."""
    block = StockBlock(24, 3, use_rel_pos=True, window_size=window_size, input_size=(7, 5))
    torch.manual_seed(0)
    for parameter in block.parameters():
        parameter.data.normal_(std=0.3)
    return block.to(dtype)


def ours(stock: StockBlock) -> Block:
    stock = copy.deepcopy(stock)
    stock.attn = RelativeAttention(stock.attn)
    return Block(stock)


def results(block: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, and the gradient of the input and of every parameter."""
    x = x.clone().requires_grad_()
    y = block(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = {name: p.grad for name, p in block.named_parameters()}
    assert all(g is not None for g in gradients.values())
    return {"y": y.detach(), "x": x.grad, **gradients}


@pytest.fixture(params=sorted(FORMS.keys() - {"flexible"}))
def form(request, monkeypatch):
    """Every form of the attention, taken on the CPU."""
    monkeypatch.setitem(FORMS, "chunked", FORMS[request.param])
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window_size", [0, 4])
def test_block_equals_stock(form, window_size, dtype):
    stock = stock_block(window_size, dtype)
    x = torch.randn(2, 7, 5, 24, dtype=dtype)
    expected, found = results(stock, x), results(ours(stock), x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item())
        assert (found[name] - value).abs().max() < TOLERANCE[dtype] * scale, name


@pytest.mark.parametrize("grid", [(4, 4), (9, 6)])
def test_tables_of_another_grid_are_resized_as_in_stock(form, grid):
    stock, x = stock_block(0), torch.randn(1, *grid, 24, dtype=torch.float64)
    assert torch.allclose(ours(stock)(x), stock(x), atol=1e-12)


@pytest.mark.parametrize("window_size", [0, 4])
def test_the_form_for_gpus_alone_equals_stock_forward(window_size):
    stock, x = stock_block(window_size), torch.randn(2, 7, 5, 24, dtype=torch.float64)
    block = ours(stock)
    block.attn.form = "flexible"
    with torch.no_grad():
        assert torch.allclose(block(x), stock(x), atol=1e-12)


@pytest.mark.parametrize("values", [1, 300, 10**9])
@pytest.mark.parametrize("window_size", [0, 4])
def test_groups_of_any_size_give_the_same(monkeypatch, window_size, values):
    """One row of one head at a time, a part of an image, or all images at once."""
    stock = stock_block(window_size)
    x = torch.randn(3, 7, 5, 24, dtype=torch.float64)
    monkeypatch.setattr(fused, "_most_values", lambda: values)
    expected, found = results(stock, x), results(ours(stock), x)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-11), name


def test_a_projection_that_looks_around_sees_whole_windows():
    """Stock's order, in which the zeros beyond the border go through it too."""
    stock = stock_block(4)
    block = ours(stock)
    block.attn.qkv.looks_around = True
    seen = []
    block.attn.qkv.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    x = torch.randn(2, 7, 5, 24, dtype=torch.float64)
    assert torch.allclose(block(x), stock(x), atol=1e-12)
    assert seen == [(2 * 2 * 2, 4, 4, 24)]


@pytest.mark.parametrize("window_size", [0, 4])
def test_nothing_of_all_pairs_is_kept(window_size):
    """The largest tensor kept for the backward pass is q, k and v; stock's is the logits."""
    sizes = []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    block = ours(stock_block(window_size, torch.float32)).requires_grad_(False)
    x = torch.randn(1, 21, 21, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        block.attend(x)
    assert max(sizes) == 21 * 21 * 24 * 3


def test_half_precision_is_as_close_as_its_digits():
    block = ours(stock_block(4, torch.float32))
    x = torch.randn(2, 7, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        half = results(block, x)
    block.zero_grad()
    exact = results(block, x)
    for name, value in exact.items():
        error = (half[name].float() - value).norm() / value.norm()
        assert error < 0.03, (name, error)  # bf16 has 8 bits: 0.4 % per rounding, a few in a row


@pytest.mark.parametrize("window_size", [0, 4])
def test_operations_are_counted_as_those_of_plain_products(window_size):
    def count(form: str) -> int:
        side, heads, d = (window_size or 7), 3, 8
        qkv = torch.randn(2, 7, 7, 3, heads, d, requires_grad=True)
        outside = torch.randn(3, heads, d)
        tables = torch.randn(2, side, side, d)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            FORMS[form](qkv, outside, *tables, [side, side])
        return counter.get_total_flops()

    assert count("chunked") == count("biased") > 0


def test_compiles_as_one_graph():
    block = ours(stock_block(4))
    x = torch.randn(1, 7, 5, 24, dtype=torch.float64)
    expected = results(block, x)
    block.zero_grad()
    block.compile(backend="aot_eager", fullgraph=True)
    found = results(block, x)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-12), name


def test_the_decoders_attention_equals_stock():
    torch.manual_seed(0)
    stock = TwoWayTransformer(depth=2, embedding_dim=32, num_heads=4, mlp_dim=16).double()
    ours = fuse_attention(copy.deepcopy(stock))
    image, positions = torch.randn(2, 2, 32, 3, 4).double()
    tokens = torch.randn(2, 5, 32).double()
    expected, found = (model(image, positions, tokens) for model in (stock, ours))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    assert ours.state_dict().keys() == stock.state_dict().keys()
