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
EVERY_GRADIENT = (True, True, True, True)
GRADIENTS = [EVERY_GRADIENT] * 16 + list(itertools.product((True, False), repeat=4))
ENDING = ("zeros", "mask", "shift")  # borders that an axis whose windows end at the query may have
BORDERS = (*ENDING, "reflect", "replicate", "circular")
LAYOUTS = ("contiguous", "channels_last", "sliced", "thinned", "transposed", "expanded", "offset", "chunk", "padded")


@dataclass(frozen=True)
class Problem:
    """One call of an operator: everything but dtype and device."""

    batch: int
    heads: int
    key_depth: int
    value_depth: int
    size: tuple[int, int]  # of the queries
    kernel: tuple[int, int]
    border: tuple[str, str]
    scale: float | None
    layouts: tuple[str, str, str, str]  # of query, key, value and the output's gradient
    wanted: tuple[bool, bool, bool, bool]  # whose gradients
    used: str  # what the loss uses: "out", "lse" or "both"
    spread: float  # standard deviation of the logits
    magnitude: float  # of values and weights
    seed: int
    keys: tuple[int, int] | None = None  # the size of their grid, None: that of the queries
    kv_heads: int | None = None
    dilation: tuple[int, int] = (1, 1)
    causal: bool | tuple[bool, bool] | str = False
    bias: str = "none"  # or "slot", "patch", "displacement"
    key_mask: str = "none"  # or how much of the map is there: "most", "little", "nothing"
    weight_layout: str = "transposed"  # or "contiguous"

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

    @property
    def geometry(self) -> dict:
        """The options that every operator takes, of the public functions, of plain code and of the oracle."""
        return {
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "border": self.border,
            "dilation": self.dilation,
            "causal": self.causal,
        }

    def maps(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Query, key, value and a gradient of the output."""
        generator = torch.Generator().manual_seed(self.seed)
        long = (self.spread / (abs(self.factor) or 1.0) * self.key_depth**-0.5) ** 0.5
        keys, kv_heads = self.keys or self.size, self.kv_heads or self.heads
        maps = []
        for layout, length, channels, size in zip(
            self.layouts,
            (long, long, self.magnitude, 1.0),
            (self.heads * self.key_depth, kv_heads * self.key_depth, kv_heads * self.value_depth)
            + (self.heads * self.value_depth,),
            (self.size, keys, keys, self.size),
            strict=True,
        ):
            x = length * torch.randn(self.batch, channels, *size, generator=generator)
            maps.append(lay_out(x.to(device, dtype), layout))
        return maps

    def bias_numbers(self, dtype: torch.dtype, device: str) -> Tensor | None:
        """[heads, kH*kW], [heads, kH, kW] or [heads, 2*kH-1, 2*kW-1], not contiguous."""
        if self.bias == "none":
            return None
        displacements = tuple(2 * k - 1 for k in self.kernel)
        shape = {"slot": (self.slots,), "patch": self.kernel, "displacement": displacements}[self.bias]
        generator = torch.Generator().manual_seed(self.seed + 3)
        bias = self.spread * torch.randn(*reversed(shape), self.heads, generator=generator)
        return bias.to(device, dtype).permute(*reversed(range(bias.dim())))

    def mask(self, device: str) -> Tensor | None:
        """[B, Hk, Wk], False where no key is; not contiguous."""
        if self.key_mask == "none":
            return None
        generator = torch.Generator().manual_seed(self.seed + 4)
        height, width = self.keys or self.size
        chances = torch.rand(self.batch, width, height, generator=generator)
        return (chances < {"most": 0.7, "little": 0.15, "nothing": 0.0}[self.key_mask]).to(device).transpose(1, 2)

    def weights(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Weights of any sign, [B, heads, H, W, kH*kW], and a gradient of such."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = self.batch, self.heads, self.slots, *self.size
        weights = [length * torch.randn(shape, generator=generator) for length in (self.magnitude, 1.0)]
        weights = [x.to(device, dtype).movedim(2, -1) for x in weights]
        return [x.contiguous() for x in weights] if self.weight_layout == "contiguous" else weights

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
def problems(draw, largest: int = 17, deepest: int = 40, most: int = 4, work: int = 2**19):
    """Problems of maps up to `largest` pixels wide, `deepest` channels per head, `most` images and heads.

    `work` bounds the numbers that plain code stores for them. A quarter has plain windows.
    """
    size = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    if draw(st.sampled_from((True, False, False, False))):
        window = {"border": (draw(st.sampled_from(("zeros", "mask"))),) * 2}
        kernel = draw(kernels((largest + 4, largest + 4)))
    else:
        window = draw(windows(size, largest))
        kernel = draw(kernels(largest_kernel(**window, size=size, largest=largest)))
        plain_bias = ["none", "none", "slot", "patch"]
        window["bias"] = draw(st.sampled_from(plain_bias + 3 * ["displacement"] * ("shift" in window["border"])))
        window["key_mask"] = draw(st.sampled_from(("none", "none", "most", "little", "most", "nothing")))
    left = max(1, work // (size[0] * size[1] * kernel[0] * kernel[1]))
    heads = draw(st.integers(1, min(most, left)))
    left = max(1, left // heads)
    channels = min(deepest, left)
    depth = st.one_of(st.sampled_from([d for d in (1, 8, 16, 32) if d <= channels]), st.integers(1, channels))
    depths = draw(depth), draw(depth)
    if "dilation" in window:
        window["kv_heads"] = draw(st.sampled_from([None] + [n for n in range(1, heads + 1) if heads % n == 0]))
    return Problem(
        batch=draw(st.integers(1, min(most, max(1, left // max(depths))))),
        heads=heads,
        key_depth=depths[0],
        value_depth=depths[1],
        size=size,
        kernel=kernel,
        scale=draw(st.sampled_from((1.0, None, 0.3, -0.7, 1.0, None, 0.0))),
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(4)),
        wanted=draw(st.sampled_from(GRADIENTS)),
        used=draw(st.sampled_from(("both", "out", "lse"))),
        spread=draw(st.sampled_from((1.0, 0.3, 4.0))),
        magnitude=draw(st.sampled_from((1.0, 0.1, 8.0))),
        seed=draw(st.integers(0, 2**32)),
        **window,
    )


@st.composite
def windows(draw, size: tuple[int, int], largest: int) -> dict:
    """Grid of the keys, border, dilation and causality, of those that go together."""
    pixels = st.integers(1, largest)
    twice, half = tuple(min(2 * n, largest) for n in size), tuple((n + 1) // 2 for n in size)
    keys = draw(st.one_of(st.none(), st.none(), st.sampled_from((twice, half, (1, 1))), st.tuples(pixels, pixels)))
    causal = draw(st.sampled_from((False, False, False, False, True, "raster", (True, False), (False, True), "raster")))
    if causal == "raster":
        of_y = of_x = ("zeros", "mask")
    else:
        of_y, of_x = (ENDING if end else BORDERS for end in causality(causal))
    first = draw(st.sampled_from(of_y))
    border = first, draw(st.sampled_from([first if first in of_x else "mask", *of_x]))
    steps = st.sampled_from((1, 1, 2, 3, 5))
    dilation = draw(st.one_of(st.just((1, 1)), st.tuples(steps, steps)))
    dilation = tuple(
        min(step, n) if name == "shift" else step for step, n, name in zip(dilation, keys or size, border, strict=True)
    )
    return {"keys": keys, "border": border, "dilation": dilation, "causal": causal}


def causality(causal) -> tuple[bool, bool]:
    """Whether windows end at the query, on each axis."""
    return {False: (False, False), True: (True, True), "raster": (False, False)}.get(causal, causal)


def largest_kernel(keys, border, dilation, causal, size: tuple[int, int], largest: int) -> tuple[int, int]:
    """What the border can serve on each axis."""
    limits = []
    for n, name, step, end in zip(keys or size, border, dilation, causality(causal), strict=True):
        reach = {"reflect": n - 1, "circular": n}.get(name, step * largest)
        limit = n // step if name == "shift" and not end else 2 * (reach // step) + 1
        limits.append(min(limit, largest + 4))
    return tuple(limits)


@st.composite
def kernels(draw, limits: tuple[int, int]) -> tuple[int, int]:
    """Oblong windows, square ones as far as the limits allow, and columns."""
    of_y, of_x = (st.one_of(st.integers(1, min(7, n)), st.integers(1, n)) for n in limits)
    height = draw(of_y)
    return height, draw(st.one_of(of_x, st.just(min(height, limits[1])), st.just(1)))


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
