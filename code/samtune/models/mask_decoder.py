"""SAM's mask decoder with one row per question, all rows of a batch in one call; K classes at once.

Sources of the layouts for K classes: hitachinsk/SAMed e351840 (samed), usagisukisuki/G-SAM 31dfd1c
(gsam).
"""

from __future__ import annotations

import torch
from segment_anything.modeling import MaskDecoder
from segment_anything.modeling.mask_decoder import MLP
from segment_anything.modeling.transformer import Attention, TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional as F

LAYOUTS = ("samed", "gsam")
_GSAM_IOUS = 4  # estimates of G-SAM's IoU head, whatever the number of classes


class TokenAttention(nn.Module):
    """The transformer's attention on stock's parameters, by torch's fused kernels."""

    def __init__(self, stock: Attention):
        super().__init__()
        self.num_heads = stock.num_heads
        self.q_proj, self.k_proj, self.v_proj = stock.q_proj, stock.k_proj, stock.v_proj
        self.out_proj = stock.out_proj

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(R, N, C), (R, N', C), (R, N', C) -> (R, N, C)."""
        projected = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        heads = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in projected)
        return self.out_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def fuse_attention(transformer: TwoWayTransformer) -> TwoWayTransformer:
    """Replace the stock transformer's attentions in place; names do not change."""
    for parent in list(transformer.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Attention):
                setattr(parent, name, TokenAttention(child))
    return transformer


class ClassDecoder(nn.Module):
    """A mask decoder that answers with one mask per class, on the parts of a stock one.

    num_classes: K of at least 2, the background being one of them. (One kind of object against its
    background needs no such decoder: the first mask of SAM's own answers.)
    layout: which tokens and networks carry the classes.
    'samed': SAM's IoU token, K mask tokens, K new hyper-networks.
    'gsam': K "IoU" tokens, then 4 K + 1 mask tokens. Token 1 + c carries class c, so all classes
    but the last lie in IoU tokens; further mask tokens only take part in the attention. The first
    four hyper-networks are SAM's. It serves to load G-SAM's files, where K is at least 3.

    Tokens, hyper-networks and IoU head that are not SAM's start anew, under stock's names.
    Raises ValueError for another layout or too few classes.
    """

    def __init__(self, stock: MaskDecoder, num_classes: int, layout: str = "samed"):
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r}: choose from {', '.join(LAYOUTS)}")
        gsam = layout == "gsam"
        if num_classes < (fewest := 3 if gsam else 2):
            raise ValueError(f"layout {layout} needs at least {fewest} classes, not {num_classes}")
        dim = stock.transformer_dim
        self.transformer = stock.transformer
        self.output_upscaling = stock.output_upscaling
        self.iou_token = nn.Embedding(num_classes, dim) if gsam else stock.iou_token
        self.mask_tokens = nn.Embedding(4 * num_classes + 1 if gsam else num_classes, dim)
        kept = list(stock.output_hypernetworks_mlps)[:num_classes] if gsam else []
        fresh = (MLP(dim, dim, dim // 8, 3) for _ in range(num_classes - len(kept)))
        self.output_hypernetworks_mlps = nn.ModuleList([*kept, *fresh])
        layers = stock.iou_prediction_head.layers
        estimates = _GSAM_IOUS if gsam else num_classes
        self.iou_prediction_head = MLP(dim, layers[0].out_features, estimates, len(layers))


def masks_read(decoder: MaskDecoder | ClassDecoder) -> slice:
    """Which of its masks are the answer: the first of SAM's own, every one of a class decoder."""
    return slice(None) if isinstance(decoder, ClassDecoder) else slice(0, 1)


def decode_masks(
    decoder: MaskDecoder | ClassDecoder,
    features: Tensor,
    image_pe: Tensor,
    sparse: Tensor,
    dense: Tensor,
    masks: slice | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode row r from features[r] and its own prompt.

    features: (R, C, h, w). image_pe: (1 or R, C, h, w) position encoding. sparse: (R, T, C) prompt
    tokens, T may be 0. dense: (1 or R, C, h or 1, w or 1), added to the features. masks: which
    masks are decoded, None for those of `masks_read`; only their hyper-networks run. Returns logits
    (R, T', 4h, 4w) and SAM's estimate of each mask's IoU (R, T'); in the gsam layout the estimates
    are four and belong to no class.

    Equal to the stock decoder called once per image. Stock itself repeats the whole image batch for
    every prompt, and so pairs prompts with wrong images as soon as there are several images.
    """
    masks = masks_read(decoder) if masks is None else masks
    rows, channels, height, width = features.shape
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    queries = torch.cat([own.expand(rows, -1, -1), sparse], dim=1)  # (R, own + T, C)
    queries, keys = decoder.transformer(features + dense, image_pe, queries)

    keys = keys.transpose(1, 2).reshape(rows, channels, height, width)
    upscaled = decoder.output_upscaling(keys)  # (R, C / 8, 4h, 4w)
    networks = decoder.output_hypernetworks_mlps
    asked = range(len(networks))[masks]
    weights = [networks[i](queries[:, 1 + i]) for i in asked]
    logits = torch.stack(weights, dim=1) @ upscaled.flatten(2)  # (R, T', 16hw)
    iou = decoder.iou_prediction_head(queries[:, 0])[:, masks]
    return logits.unflatten(2, upscaled.shape[2:]), iou
