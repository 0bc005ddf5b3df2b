"""The plain PyTorch twin of the original extension, as users write it today: the baseline of tests and benchmarks.

One head, no scaling, zeros outside the map. It stores kH*kW copies of the keys and of the values; that is the point.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def unfold_similarity(query: Tensor, key: Tensor, kH: int, kW: int) -> Tensor:
    """Logits <query, key_ij> of maps [B, C, H, W] -> [B, H, W, kH*kW]."""
    b, _, h, w = query.shape
    pixels = query.flatten(2).transpose(1, 2).unsqueeze(2)  # [B, H*W, 1, C]
    patches = _patches(key, kH, kW).permute(0, 3, 1, 2)  # [B, H*W, C, kH*kW]
    return torch.matmul(pixels, patches).view(b, h, w, kH * kW)


def unfold_weighting(value: Tensor, weight: Tensor, kH: int, kW: int) -> Tensor:
    """Sums weight_ij * value_ij of a map [B, C, H, W] and weights [B, H, W, kH*kW] -> [B, C, H, W]."""
    b, c, h, w = value.shape
    patches = _patches(value, kH, kW).permute(0, 3, 1, 2)  # [B, H*W, C, kH*kW]
    sums = torch.matmul(patches, weight.flatten(1, 2).unsqueeze(3))  # [B, H*W, C, 1]
    return sums.squeeze(3).transpose(1, 2).reshape(b, c, h, w)


def unfold_attention(query: Tensor, key: Tensor, value: Tensor, kH: int, kW: int) -> Tensor:
    """Attention of every pixel over the kH x kW patch around it, [B, C, H, W] maps."""
    return unfold_weighting(value, unfold_similarity(query, key, kH, kW).softmax(-1), kH, kW)


def _patches(x: Tensor, kH: int, kW: int) -> Tensor:
    """[B, C, H, W] -> [B, C, kH*kW, H*W]: slot i*kW + j of pixel (y, x) is the pixel (y - kH//2 + i, x - kW//2 + j)."""
    b, c, h, w = x.shape
    padded = F.pad(x, (kW // 2, kW - 1 - kW // 2, kH // 2, kH - 1 - kH // 2))
    return F.unfold(padded, (kH, kW)).view(b, c, kH * kW, h * w)
