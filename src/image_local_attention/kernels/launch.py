"""From maps to a kernel launch: the plan, the ways to read them, the grid and the constants that follow."""

import math

import torch
from torch import Tensor
from triton import cdiv

from ..window import Window
from . import gpu as gpus
from . import plan
from .source import Source, column_step, layout, source

_MOST_PROGRAMS = 65_535  # on the second and third axis of a grid


class Launch:
    """A launch over maps [B, heads, H, W, D]: each program keeps a tile of some and streams the halo of others.

    `lead` is how many columns the halo begins left of the tile. `sources` are those of the kept, then of the
    streamed maps. Tiles are shifted left by `shift` columns, and halos begin `pad` columns early where their
    blocks cover these anyway, so that copies begin where they are cheap.
    """

    def __init__(
        self,
        task: str,
        kept: tuple[Tensor, ...],
        streamed: tuple[Tensor, ...],
        window: Window,
        lead: int,
        precision: str,
    ) -> None:
        maps = *kept, *streamed
        self.first = maps[0]
        gpu = gpus.of(self.first.device)
        layouts = [layout(x) for x in maps]
        product = gpu.product(self.first.dtype, precision)
        depth = max(x.shape[4] for x in maps)
        planes = "planes" in layouts[len(kept) :]
        self.plan = plan.INTERPRETED if gpu.interpreted else plan.choose(task, product, depth, window.kernel, planes)
        ways = [gpu.way(each, self.plan.stream_by_pointer) for each in layouts[len(kept) :]]
        tile_w, kernel_w = self.plan.tile[1], window.kernel[1]
        step, vector = (
            max((column_step(x, way, wide) for x, way in zip(streamed, ways, strict=True)), default=1)
            for wide in (tile_w, 1)
        )
        self.pad = self.plan.free_columns(kernel_w, -lead % vector, step)
        self.shift = -(lead + self.pad) % step
        ways = [self._way_to_keep(x, gpu) for x in kept] + ways
        block = self.plan.block_shape(kernel_w + self.pad, step)
        shapes = [self.plan.tile] * len(kept) + [block] * len(streamed)
        self.sources = [source(*each) for each in zip(maps, shapes, ways, strict=True)]
        self.constants = {
            "KH": window.kernel[0],
            "KW": window.kernel[1],
            "TH": self.plan.tile[0],
            "TW": tile_w,
            "ROWS": block[0],
            "COLS": block[1],
            "SHIFT": self.shift,
            "PAD": self.pad,
            "PRODUCT": product,
        }

    def _way_to_keep(self, x: Tensor, gpu: gpus.Gpu) -> str:
        way = gpu.way(layout(x), self.plan.keep_by_pointer)
        step = column_step(x, way, 1)
        return way if self.plan.tile[1] % step == 0 and self.shift % step == 0 else "pointer"

    @property
    def size(self) -> tuple[int, int, int]:
        """H, W and heads, as every kernel takes them."""
        _, heads, h, w, _ = self.first.shape
        return h, w, heads

    @property
    def grid(self) -> tuple[int, ...]:
        """A program for each tile of each head of each image: on three axes, on one where these are too short."""
        h, w, heads = self.size
        tiles_y, tiles_x = cdiv(h, self.plan.tile[0]), cdiv(w + self.shift, self.plan.tile[1])
        grid = heads * tiles_x, tiles_y, self.first.shape[0]
        return grid if max(grid[1:]) <= _MOST_PROGRAMS else (math.prod(grid),)

    def __call__(self, kernel, *args: object, addressed: tuple[Tensor | None, ...], **constants: object) -> None:
        """Launches. `addressed`: the tensors whose pixels the kernel may reach by pointer."""
        wide = any(_span(x) >= 2**31 for x in addressed if x is not None)
        grid = self.grid
        with torch.cuda.device_of(self.first):
            kernel[grid](
                *args,
                **self.constants,
                **constants,
                WIDE=wide,
                FLAT=len(grid) == 1,
                num_warps=self.plan.warps,
                num_stages=self.plan.stages,
            )


def depths(query: Tensor, value: Tensor) -> dict[str, int]:
    """Channels of a head, and how many a tile holds."""
    dk, dv = query.shape[4], value.shape[4]
    return {"DK": dk, "DV": dv, "DKP": gpus.padded(dk), "DVP": gpus.padded(dv)}


def ways(**sources: Source) -> dict[str, str]:
    """The constants Q_WAY, K_WAY ... of the sources q, k ..."""
    return {f"{name.upper()}_WAY": each.way for name, each in sources.items()}


def _span(x: Tensor) -> int:
    """Elements from the first to the last of one head of one image."""
    return sum((size - 1) * stride for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True))
