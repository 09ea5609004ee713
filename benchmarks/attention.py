"""Time the forms of the image encoder's attention, forward and backward, as one JSON line.

    python benchmarks/attention.py --form NAME --image_size 1024 --batch_size 8 --precision bf16

One block's attention of vit_b, its weights frozen, its input with a gradient: the global one, or
with --window 14 that of the windows. `samtune.models.attention.FORMS` lists the forms by name;
'default' is the device's, 'stock' that of segment_anything.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch
from segment_anything.modeling.image_encoder import Attention, window_partition
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))

from samtune.models.attention import FORMS, RelativeAttention

WIDTH, HEADS, PATCH = 768, 12, 16  # vit_b's


def build(form: str, grid: int) -> nn.Module:
    """The attention of (B, grid, grid, WIDTH) tokens."""
    stock = Attention(WIDTH, HEADS, use_rel_pos=True, input_size=(grid, grid))
    nn.init.normal_(stock.rel_pos_h, std=0.02)
    nn.init.normal_(stock.rel_pos_w, std=0.02)
    if form == "stock":
        return stock
    forms = ("default", *FORMS)
    if form not in forms:
        raise SystemExit(f"--form {form}: there are stock, {', '.join(forms)}")
    module = RelativeAttention(stock)
    module.form = "" if form == "default" else form
    return module


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--form", default="default")
    parser.add_argument("--image_size", type=int, default=1024, help="side of a square, pixels")
    parser.add_argument("--window", type=int, default=0, help="tokens; 0: global")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", choices=("yes", "no"), default="no")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    grid = args.image_size // PATCH
    tokens = torch.randn(args.batch_size, grid, grid, WIDTH, device=device)
    if args.window:
        tokens, _ = window_partition(tokens, args.window)
    module = build(args.form, args.window or grid).requires_grad_(False).to(device)
    if args.compile == "yes":
        module.compile()
    print(json.dumps(time_it(module, tokens.requires_grad_(True), device, args)), flush=True)


def time_it(module: nn.Module, tokens: torch.Tensor, device: torch.device, args) -> dict:
    """Seconds of forward and backward, and the peak of memory in bytes."""
    on_gpu = device.type == "cuda"
    for step in range(args.steps + 2):
        if step == 2:
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, args.precision == "bf16"):
            out = module(tokens)
        out.backward(out.detach())
        tokens.grad = None
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / args.steps
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    return {
        "seconds_per_step": round(seconds, 6),
        "images_per_second": round(args.batch_size / seconds, 4),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else rss,
        **{
            n: getattr(args, n) for n in ("form", "image_size", "window", "batch_size", "precision")
        },
    }


if __name__ == "__main__":
    main(sys.argv[1:])
