"""Non-local means, which is local attention between the patches of one image.

The weight of pixel q in the average at pixel p is exp(-|P - Q|^2 / h^2), where P and Q are the patches
around them. As |P - Q|^2 = |P|^2 - 2 P.Q + |Q|^2, and |P|^2 is one constant of the softmax at p, the
logit is 2/h^2 * (P.Q - |Q|^2 / 2): the dot product of (P, 1) and (Q, -|Q|^2 / 2). Values are the colours.

A. Buades, B. Coll, J.-M. Morel: A non-local algorithm for image denoising. CVPR 2005.
"""

import math
from collections.abc import Callable, Iterator
from itertools import product

import torch

from .functional import local_attention

# Below this, h^2 is under what fp32 resolves of a patch distance, and under half a step of 16 bits:
# only equal patches would be averaged, so the image is its own result.
SMALLEST_H = 2.0**-17

SMALLEST_BLOCK = 16

# The median of |x| for a standard normal x.
NORMAL_MEDIAN = 0.6744897501960817


@torch.no_grad()
def non_local_means(
    image: torch.Tensor,
    *,
    sigma: float | None = None,
    window: int = 21,
    patch: int = 5,
    strength: float = 1.0,
    patch_weights: str = "gaussian",
    device: torch.device | str | None = None,
    backend: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    block_bytes: int = 256 * 2**20,
) -> torch.Tensor:
    """Average every pixel with those of its window whose patches look alike.

    image: [B, C, H, W], floating, of any number of channels; 0 is black, 1 is white.
    sigma: standard deviation of the noise on that scale; None takes `estimate_sigma(image)`.
    window, patch: odd side lengths of the search window and of the patches. Patches go on past the border
        by reflection; pixels outside the image are never averaged.
    strength: h = strength * sigma.
    patch_weights: "gaussian" (standard deviation (patch - 1) / 4) or "flat". The weights of a patch sum to
        one over its pixels and channels, so h does not depend on the patch or the number of channels.
    device: where to compute; None is the image's. The result comes back to the image's device and dtype.
    backend: as in `local_attention`.
    progress: called with (pixels done, pixels in all) after each block.
    block_bytes: the image is worked on in blocks whose patch maps take about this much memory. Blocks
        overlap by half a window, so the result does not depend on them.

    Computes in fp32, or fp64 for fp64 images, also under autocast; a float32 matmul precision below "highest"
    costs accuracy where sigma is small. No gradient flows through it. With Gaussian weights this is
    scikit-image's `denoise_nl_means(fast_mode=False, sigma=0, patch_distance=window // 2)`, without its
    cut-off of small weights.
    """
    _check_arguments(image, sigma, window, patch, strength, patch_weights, block_bytes)
    h = strength * (estimate_sigma(image) if sigma is None else sigma)
    if h < SMALLEST_H or image.numel() == 0:
        return image.clone()

    batch, channels, height, width = image.shape
    dtype = torch.promote_types(image.dtype, torch.float32)
    device = image.device if device is None else torch.device(device)
    # |P|^2 and P.Q cancel to |P - Q|^2 in the softmax: the smaller they are, the less rounding is left. So with sums
    # of many values.
    mean = image.mean((0, 2, 3), keepdim=True, dtype=dtype).to(device)
    taps = _patch_taps(patch, patch_weights) / channels
    halo, reach = window // 2, patch // 2
    pixel_bytes = batch * (2 * channels * patch**2 + 4 * channels + 2) * dtype.itemsize
    result = torch.empty_like(image)
    done = 0
    for rows, columns in _blocks(height, width, halo, block_bytes // pixel_bytes):
        seen_rows, seen_columns = _grow(rows, halo, height), _grow(columns, halo, width)
        around = _reflected_crop(image, seen_rows, seen_columns, reach).to(device, dtype) - mean
        query, key = _patch_maps(around, taps)
        value = around[..., reach : reach + len(seen_rows), reach : reach + len(seen_columns)]
        # Logits reach |P|^2 / h^2, which half precision cannot tell apart.
        with torch.autocast(device.type, enabled=False):
            out = local_attention(query, key, value, window, scale=2.0 / h**2, border="mask", backend=backend)
        top, left = rows.start - seen_rows.start, columns.start - seen_columns.start
        inner = out[..., top : top + len(rows), left : left + len(columns)] + mean
        result[..., rows.start : rows.stop, columns.start : columns.stop] = inner
        done += len(rows) * len(columns)
        if progress is not None:
            progress(done, height * width)
    return result


@torch.no_grad()
def estimate_sigma(image: torch.Tensor, *, max_pixels: int = 2**22) -> float:
    """The standard deviation of white Gaussian noise in an image of values in [0, 1], [B, C, H, W].

    The 3x3 mask of J. Immerkaer (Fast noise variance estimation, CVIU 64(2), 1996), second differences
    along both axes, which cancels whatever is linear along rows or columns; then the median of its absolute
    value, as D. Donoho and I. Johnstone (Ideal spatial adaptation by wavelet shrinkage, Biometrika 81(3),
    1994), so that edges and textures over less than half of the image do not count as noise. Neighbourhoods
    that touch 0 or 1 are left out: clipping has taken part of their noise. Returns the root mean square
    over channels; 0 where nothing can be measured (all clipped).

    Measures evenly spread rows, about max_pixels in all, which bounds time and memory on large images.
    """
    _check_image(image)
    batch, channels, height, width = image.shape
    if height < 3 or width < 3:
        raise ValueError(f"image must be at least 3x3 to estimate noise, got {height}x{width}; give sigma")
    count = min(height - 2, max(1, max_pixels // (batch * width)))
    rows = torch.linspace(1, height - 2, count, device=image.device, dtype=torch.float64).round().long()
    variances = []
    for channel in range(channels):
        plane = image[:, channel].to(torch.promote_types(image.dtype, torch.float32))
        above, middle, below = (plane[:, rows + shift] for shift in (-1, 0, 1))
        vertical = above - 2.0 * middle + below
        detail = (vertical[..., :-2] - 2.0 * vertical[..., 1:-1] + vertical[..., 2:]).abs() / 6.0
        lowest = torch.minimum(torch.minimum(above, middle), below).unfold(-1, 3, 1).amin(-1)
        highest = torch.maximum(torch.maximum(above, middle), below).unfold(-1, 3, 1).amax(-1)
        detail = detail[(lowest > 0.0) & (highest < 1.0)]
        level = detail.median().item() / NORMAL_MEDIAN if detail.numel() else 0.0
        variances.append(level**2)
    return math.sqrt(sum(variances) / channels)


def _check_image(image: torch.Tensor) -> None:
    if not isinstance(image, torch.Tensor):
        raise TypeError(f"image must be a torch.Tensor, got {type(image).__name__}")
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point with values in [0, 1], got {image.dtype}")
    if image.dim() != 4 or image.shape[1] == 0:
        raise ValueError(f"image must be [B, C, H, W] with C >= 1, got shape {list(image.shape)}")


def _check_arguments(image, sigma, window, patch, strength, patch_weights, block_bytes) -> None:
    _check_image(image)
    for name, side in (("window", window), ("patch", patch)):
        if isinstance(side, bool) or not isinstance(side, int):
            raise TypeError(f"{name} must be an int, got {type(side).__name__}")
        if side < 1 or side % 2 == 0:
            raise ValueError(f"{name} must be odd and at least 1, got {side}")
    if sigma is not None and not 0.0 <= sigma < math.inf:
        raise ValueError(f"sigma must be None or a finite number >= 0, got {sigma}")
    if not 0.0 <= strength < math.inf:
        raise ValueError(f"strength must be a finite number >= 0, got {strength}")
    if patch_weights not in ("gaussian", "flat"):
        raise ValueError(f'patch_weights must be "gaussian" or "flat", got {patch_weights!r}')
    if block_bytes < 1:
        raise ValueError(f"block_bytes must be at least 1, got {block_bytes}")
    # A NaN would spread over whole windows. The extremes show it without a map of booleans.
    if image.numel() and not torch.stack(image.aminmax()).isfinite().all():
        raise ValueError("image must be finite, got NaN or infinite values")


def _patch_taps(patch: int, patch_weights: str) -> torch.Tensor:
    """The weight of each pixel of a patch in |P - Q|^2, [patch, patch], fp64, summing to one."""
    if patch == 1 or patch_weights == "flat":
        return torch.full((patch, patch), 1.0 / patch**2, dtype=torch.float64)
    offsets = torch.arange(patch, dtype=torch.float64) - patch // 2
    axis = torch.exp(-(offsets**2) / (2.0 * ((patch - 1) / 4.0) ** 2))
    return torch.outer(axis, axis) / axis.sum() ** 2


def _blocks(height: int, width: int, halo: int, pixels: int) -> Iterator[tuple[range, range]]:
    """Cut the image into near-equal blocks which, grown by the halo, hold about `pixels` pixels each.

    A block is never narrower than its two halos, or nearly all work would be thrown away.
    """
    side = max(math.isqrt(pixels) - 2 * halo, 2 * halo, SMALLEST_BLOCK)
    steps = [math.ceil(size / math.ceil(size / side)) for size in (height, width)]
    for top, left in product(range(0, height, steps[0]), range(0, width, steps[1])):
        yield range(top, min(top + steps[0], height)), range(left, min(left + steps[1], width))


def _grow(span: range, by: int, size: int) -> range:
    return range(max(span.start - by, 0), min(span.stop + by, size))


def _reflected_crop(image: torch.Tensor, rows: range, columns: range, reach: int) -> torch.Tensor:
    """The rows and columns of the image and `reach` more on each side, reflected where the image ends."""
    height, width = image.shape[-2:]
    at_y = _reflected(rows, reach, height, image.device)
    at_x = _reflected(columns, reach, width, image.device)
    return image[..., at_y[:, None], at_x]


def _reflected(span: range, reach: int, size: int, device: torch.device) -> torch.Tensor:
    period = max(2 * (size - 1), 1)
    at = torch.arange(span.start - reach, span.stop + reach, device=device).remainder(period)
    return torch.minimum(at, period - at)


def _patch_maps(around: torch.Tensor, taps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries (P, 1) and keys (Q, -|Q|^2 / 2) of an image that reaches half a patch over every side.

    Patches are scaled by the root of their taps, so that dot products are weighted ones.
    """
    patch = taps.shape[0]
    batch, channels, height, width = around.shape
    height, width = height - patch + 1, width - patch + 1
    query = around.new_empty(batch, channels * patch**2 + 1, height, width)
    norm = around.new_zeros(batch, height, width)
    for slot, (dy, dx) in enumerate(product(range(patch), repeat=2)):
        part = query[:, slot * channels : (slot + 1) * channels]
        part.copy_(around[..., dy : dy + height, dx : dx + width]).mul_(taps[dy, dx].sqrt().item())
        norm += part.square().sum(1)
    query[:, -1] = 1.0
    key = query.clone()
    key[:, -1] = -0.5 * norm
    return query, key
