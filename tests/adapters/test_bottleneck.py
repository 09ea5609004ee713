"""The adapters beside a layer: what the fixtures do not show."""

import pytest
import torch

from samtune.adapters.bottleneck import BottleneckAdapter, SpatialMultiscaleAdapter


@pytest.mark.parametrize("grid", [(1, 1), (5, 7), (40, 30)])
def test_any_grid(grid):
    adapter = SpatialMultiscaleAdapter(16, 4)
    assert adapter(torch.randn(2, *grid, 16)).shape == (2, *grid, 16)


def test_published_counts():
    with torch.device("meta"):
        plain, spatial = BottleneckAdapter(768, 192), SpatialMultiscaleAdapter(768, 192)
    assert sum(p.numel() for p in plain.parameters()) == 295_872
    assert sum(p.numel() for p in spatial.parameters()) == 1_659_840


def test_images_do_not_meet():
    torch.manual_seed(0)
    adapter = SpatialMultiscaleAdapter(8, 4)
    x = torch.randn(3, 6, 6, 8)
    assert torch.allclose(adapter(x)[1:], adapter(x[1:]), atol=1e-6)


def test_taps_beyond_the_grid_get_no_gradient_and_the_others_do():
    torch.manual_seed(0)
    adapter = SpatialMultiscaleAdapter(8, 4, dilations=(3, 8))
    adapter(torch.randn(2, 8, 8, 8)).square().mean().backward()
    near, far = (adapter.aspp.convs[i].conv.weight.grad.clone() for i in (1, 2))
    assert near.abs().sum((0, 1)).all()
    assert far[..., 1, 1].any()
    far[..., 1, 1] = 0
    assert not far.any()
