"""Random problems: shapes, windows, options and memory layouts drawn by hypothesis, numbers from a seed."""

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

BATCH = 10
EVERY_GRADIENT = (True, True, True)
GRADIENTS = [EVERY_GRADIENT] * 8 + list(itertools.product((True, False), repeat=3))
LAYOUTS = ("contiguous", "channels_last", "sliced", "thinned", "transposed", "expanded", "offset", "chunk", "padded")


@dataclass(frozen=True)
class Problem:
    """One call of an operator: everything but dtype and device."""

    batch: int
    heads: int
    key_depth: int
    value_depth: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    border: str
    scale: float | None
    layouts: tuple[str, str, str, str]  # of query, key, value and the output's gradient
    wanted: tuple[bool, bool, bool]  # whose gradients
    used: str  # what the loss uses: "out", "lse" or "both"
    spread: float  # standard deviation of the logits
    magnitude: float  # of values and weights
    seed: int

    @property
    def slots(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def queries(self) -> int:
        return self.batch * self.heads * self.size[0] * self.size[1]

    @property
    def factor(self) -> float:
        """The scale that `scale` means."""
        return self.key_depth**-0.5 if self.scale is None else self.scale

    def maps(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Query, key, value and a gradient of the output."""
        generator = torch.Generator().manual_seed(self.seed)
        long = (self.spread / (abs(self.factor) or 1.0) * self.key_depth**-0.5) ** 0.5
        lengths, depths = (long, long, self.magnitude, 1.0), (self.key_depth,) * 2 + (self.value_depth,) * 2
        maps = []
        for layout, length, depth in zip(self.layouts, lengths, depths, strict=True):
            x = length * torch.randn(self.batch, self.heads * depth, *self.size, generator=generator)
            maps.append(lay_out(x.to(device, dtype), layout))
        return maps

    def weights(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Weights of any sign, [B, heads, H, W, kH*kW], not contiguous, and a gradient of such."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = self.batch, self.heads, self.slots, *self.size
        weights = [length * torch.randn(shape, generator=generator) for length in (self.magnitude, 1.0)]
        return [x.to(device, dtype).movedim(2, -1) for x in weights]

    def lse_gradient(self, dtype: torch.dtype, device: str) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 2)
        return torch.randn(self.batch, self.heads, *self.size, generator=generator).to(device, dtype)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The numbers of the map `x` in a memory layout; "expanded" repeats its first image.

    What lies between the numbers is NaN.
    """
    b, c, h, w = x.shape
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return x[:1].expand(b, c, h, w)
    around = {
        "contiguous": lambda: _nan(x, b, c, h, w),
        "sliced": lambda: _nan(x, b, c, 2 * h + 1, 3 * w + 2)[:, :, 1 : 2 * h : 2, 2 : 3 * w + 1 : 3],
        "thinned": lambda: _nan(x, b, 2 * c, h, w)[:, 1::2],
        "transposed": lambda: _nan(x, b, c, w, h).transpose(2, 3),
        "offset": lambda: _nan(x, x.numel() + 1)[1:].view(b, c, h, w),
        "chunk": lambda: _nan(x, b, 3 * c, h, w)[:, c : 2 * c],
        "padded": lambda: _nan(x, b, c, h, w + 3)[..., :w],
    }
    return around[layout]().copy_(x)


def _nan(x: Tensor, *shape: int) -> Tensor:
    return x.new_full(shape, float("nan"))


@st.composite
def problems(draw, largest: int = 17, deepest: int = 40, most: int = 3, work: int = 2**19):
    """Problems of maps up to `largest` pixels wide, `deepest` channels per head, `most` images and heads.

    `work` bounds the numbers that plain code stores for them.
    """
    size = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    extent = st.one_of(st.integers(1, 7), st.integers(1, largest + 4))
    kernel = draw(st.one_of(st.tuples(extent, extent), extent.map(lambda k: (k, k)), extent.map(lambda k: (k, 1))))
    left = max(1, work // (size[0] * size[1] * kernel[0] * kernel[1]))
    channels = min(deepest, left)
    depth = st.one_of(st.sampled_from([d for d in (1, 8, 16, 32) if d <= channels]), st.integers(1, channels))
    depths = draw(depth), draw(depth)
    left = max(1, left // max(depths))
    heads = draw(st.integers(1, min(most, left)))
    return Problem(
        batch=draw(st.integers(1, min(most, max(1, left // heads)))),
        heads=heads,
        key_depth=depths[0],
        value_depth=depths[1],
        size=size,
        kernel=kernel,
        border=draw(st.sampled_from(("zeros", "mask"))),
        scale=draw(st.sampled_from((1.0, None, 0.3, -0.7, 1.0, None, 0.0))),
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(4)),
        wanted=draw(st.sampled_from(GRADIENTS)),
        used=draw(st.sampled_from(("both", "out", "lse"))),
        spread=draw(st.sampled_from((1.0, 0.3, 4.0))),
        magnitude=draw(st.sampled_from((1.0, 0.1, 8.0))),
        seed=draw(st.integers(0, 2**32)),
    )


def for_each(strategy, count: int, name: str, check: Callable[[Problem], None]) -> None:
    """Runs `check` on `count` problems, or as many as the profile "hunt" asks for.

    The few of `make test` are the same every time and others for every `name`. They come in batches, since hypothesis
    soon begins to vary what it has.
    """
    profile = settings()
    if not profile.derandomize:
        given(strategy)(lambda problem: check(problem))()
        return
    for batch, first in enumerate(range(0, count, BATCH)):
        examples = settings(profile, max_examples=min(BATCH, count - first))
        number = zlib.crc32(f"{name} {batch}".encode())
        seed(number)(examples(given(strategy)(lambda problem: check(problem))))()
