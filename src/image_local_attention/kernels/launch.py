"""From maps to a kernel launch: the plan, the ways to read them, the grid and the constants that follow."""

import functools
import math
from copy import copy
from operator import mul

import torch
from torch import Tensor

from ..rules import Rules
from ..window import Axis, Window
from . import gpu as gpus
from . import plan, remembered
from .geometry import Span, images, spans
from .integers import cdiv
from .source import Source, column_step, layout_of, source
from .table import ceiling, table

_MOST_PROGRAMS = 65_535  # on the second and third axis of a grid


class Problem:
    """Rules on grids of two sizes: the arguments and constants that every kernel takes of them.

    queries, keys: their (height, width). until_query: the kernel may leave out rows after the query's in raster order.
    """

    def __init__(
        self,
        rules: Rules,
        heads: int,
        kv_heads: int,
        queries: tuple[int, int],
        keys: tuple[int, int],
        until_query: bool = False,
    ) -> None:
        self.rules, self.kv_heads, self.group = rules, kv_heads, heads // kv_heads
        self.sizes = (*queries, *keys)
        self.until_query = until_query
        self.axes = _axes(rules.window, queries, keys)
        self.spans = _spans(rules.window, self.axes, until_query, (True, True))

    @property
    def constants(self) -> dict[str, object]:
        return self._named(self.spans) | {"RASTER": self.rules.window.raster, "GROUP": self.group}

    def undivided(self) -> "Problem":
        """The same, but rows of maps are not taken apart: what a window leaves out between its columns is masked."""
        problem = copy(self)
        problem.spans = _spans(self.rules.window, self.axes, self.until_query, (True, False))
        return problem

    @property
    def map_spans(self) -> dict[str, Span]:
        """Constants of a kernel that does not take maps apart into lattices."""
        return self._named(_spans(self.rules.window, self.axes, False, (False, False)))

    @staticmethod
    def _named(spans: tuple[Span, Span]) -> dict[str, Span]:
        return dict(zip(("Y", "X"), spans, strict=True))

    @property
    def facts(self) -> frozenset[str]:
        """Those of `plan.FACTS` that hold, as far as windows decide."""
        rules = self.rules
        return _facts(self.spans, rules.window.raster, rules.bias is not None, rules.key_mask is not None)

    def slides(self, transposed: bool) -> bool:
        """Whether the entry of a bias is the distance of key and query plus a constant. transposed: keys are kept."""

        def follows(span: Span) -> bool:
            fixed = span.scaled or (span.shifts and not self.rules.by_displacement)
            return span.dilation == 1 and not fixed and not (transposed and span.folds)

        return self.rules.bias is not None and all(map(follows, self.spans))

    @property
    def images(self) -> tuple[int, ...]:
        """images_y, before_y, images_x, before_x."""
        return tuple(number for axis in self.axes for number in images(axis))

    @property
    def terms(self) -> tuple[Tensor | None, Tensor | None]:
        """Bias [heads, kH, kW], or by displacement, and key mask [B, heads, Hk, Wk, 1], as kernels read them."""
        bias, mask = self.rules.bias, self.rules.key_mask
        if bias is not None and not self.rules.by_displacement:
            bias = bias.unflatten(1, self.rules.window.kernel)
        if mask is not None:
            mask = mask.view(torch.uint8)[:, None, ..., None].expand(-1, self.kv_heads, -1, -1, -1)
        return bias, mask


# Every call of a model asks for the same few.
@functools.lru_cache(maxsize=4096)
def _facts(spans: tuple[Span, Span], raster: bool, biased: bool, masked: bool) -> frozenset[str]:
    folds = any(span.folds for span in spans)
    slides = not folds and all(span.slides for span in spans)
    held = {
        # one window slides over the map, and nothing but it and its border decides on logits
        "plain": slides and all(span.dilation == 1 for span in spans) and not (raster or biased or masked),
        "unbiased": not biased,
        "slides": slides,
        "shifts": any(span.shifts for span in spans) and not any(span.scaled for span in spans),
        "folds": folds,
        "gaps": spans[1].dilation > 1 and not folds,
    }
    return frozenset(fact for fact, holds in held.items() if holds)


_spans = functools.lru_cache(maxsize=4096)(spans)


@functools.lru_cache(maxsize=4096)
def _axes(window: Window, queries: tuple[int, int], keys: tuple[int, int]) -> tuple[Axis, Axis]:
    return window.axes(keys, queries)


class Launch:
    """A launch over maps [B, heads, H, W, D]: each program keeps a tile of some and streams the halo of others.

    tiles: (batch, heads, height, width) of the grid that is taken apart into tiles. transposed: these are of keys, and
    the halo is of queries. `sources` are those of the kept, then of the streamed maps. Tiles are shifted left by
    `shift` columns, and halos begin `pad` columns early where their blocks cover these anyway, so that copies begin
    where they are cheap as long as windows slide; where they do not, halos begin on multiples of `align` columns.
    """

    def __init__(
        self,
        task: str,
        kept: tuple[Tensor, ...],
        streamed: tuple[Tensor, ...],
        problem: Problem,
        tiles: tuple[int, ...],
        transposed: bool = False,
    ) -> None:
        maps = *kept, *streamed
        self.first, self.tiles = maps[0], tiles
        gpu = gpus.of(self.first.device)
        layouts = [layout_of(each) for each in maps]
        kept_layouts, streamed_layouts = layouts[: len(kept)], layouts[len(kept) :]
        product = gpu.product(maps[0].dtype, problem.rules.precision)
        depth = max(each.shape[4] for each in maps)
        planes = "planes" in streamed_layouts
        y, x = problem.spans
        dilated = task, product, depth, x.kernel, x.lattice, y.lattice > 1
        # The entry of a bias lies at a fixed distance from its neighbours only where maps are taken apart.
        if planes and problem.rules.bias is None and plan.undivided(*dilated):
            problem = problem.undivided()
        self.spans = y, x = problem.spans
        scattered = y.lattice * x.lattice > 1
        folded = not transposed and (y.folds or x.folds)
        side_by_side = x.lattice == 1 and not folded
        facts = problem.facts if scattered or folded else problem.facts | {"copies"}
        chosen = task, product, depth, x.reach, planes, facts
        self.plan = plan.INTERPRETED if gpu.interpreted else remembered.choose(self.first.device, *chosen)

        by_pointer = self.plan.stream_by_pointer or scattered or folded
        ways = [_way(gpu, each, by_pointer, side_by_side) for each in streamed_layouts]
        tile_w, reach = self.plan.tile[1], x.reach
        step, vector = (
            max((column_step(each, way, wide) for each, way in zip(streamed, ways, strict=True)), default=1)
            for wide in (tile_w, 1)
        )
        self.pad = self.shift = 0
        self.align = step
        if not (x.scaled or (transposed and x.folds)):
            lead = x.reach - 1 - x.lead if transposed else x.lead
            self.pad = self.plan.free_columns(reach, -lead % vector, step)
            self.shift = -(lead + self.pad) % step
        keep_by_pointer = self.plan.keep_by_pointer or scattered
        kept_ways = [_way(gpu, each, keep_by_pointer, side_by_side) for each in kept_layouts]
        ways = [*map(self._way_to_keep, kept, kept_ways), *ways]
        block = self.plan.block_shape(reach + self.pad, step)
        shapes = [self.plan.tile] * len(kept) + [block] * len(streamed)
        self.sources = [source(*each) for each in zip(maps, shapes, ways, strict=True)]
        self.transposed = transposed
        self.limits = {"maxnreg": self.plan.max_registers} if gpu.nvidia and self.plan.max_registers else {}
        self.constants = problem.constants | {
            "TH": self.plan.tile[0],
            "TW": tile_w,
            "ROWS": block[0],
            "COLS": block[1],
            "SHIFT": self.shift,
            "PAD": self.pad,
            "ALIGN": self.align,
            "PRODUCT": product,
        }

    def framed(self, problem: Problem) -> tuple[tuple[Tensor | None, Tensor | None], dict[str, object]]:
        """Bias and key mask as the fused kernels read them, and the constants that say how they lie.

        Tables have frames as wide as tiles and blocks reach past what windows see.
        """
        (bias, mask), row = problem.terms, 0
        names = self.constants
        excess = (
            names["TH"] + names["ROWS"],
            names["TW"] + names["COLS"] + names["SHIFT"] + names["PAD"] + names["ALIGN"],
        )
        if problem.slides(self.transposed):
            bias = table(bias, excess)
            row = bias.stride(1)
        if mask is not None and not self.transposed:
            reach = (span.reach + more for span, more in zip(self.spans, excess, strict=True))
            mask = ceiling(mask, tuple(map(mul, reach, (span.lattice for span in self.spans))))
        by_displacement = problem.rules.by_displacement
        return (bias, mask), {"BY_DISPLACEMENT": by_displacement, "ROW": row, "WARPS": self.plan.warps}

    def _way_to_keep(self, x: Tensor, way: str) -> str:
        """The way to read a tile of `x`: `way` where tiles begin and end on whole vectors of its columns."""
        step = column_step(x, way, 1)
        return way if self.plan.tile[1] % step == 0 and self.shift % step == 0 else "pointer"

    def __call__(
        self,
        kernel,
        *args: object,
        addressed: tuple[Tensor | None, ...],
        grid: tuple[int, ...] | None = None,
        **constants: object,
    ) -> None:
        """Launches. addressed: tensors whose pixels the kernel may reach by pointer. grid: None is that of tiles."""
        if grid is None:
            grid = tile_grid(self.tiles, self.plan.tile, self.shift, self.spans)
            constants["FLAT"] = len(grid) == 1
        with torch.cuda.device_of(self.first):
            kernel[grid](
                *args,
                **self.constants,
                **constants,
                WIDE=wide(addressed),
                num_warps=self.plan.warps,
                num_stages=self.plan.stages,
                **self.limits,
            )


def tile_grid(tiles: tuple[int, ...], tile: tuple[int, int], shift: int, axes: tuple[Span, Span]) -> tuple[int, ...]:
    """A program for each tile of each lattice, head and image: on three axes, on one where these are too short."""
    batch, heads, h, w = tiles
    y, x = axes
    tiles_y = cdiv(cdiv(h, y.lattice), tile[0]) * y.lattice
    tiles_x = cdiv(cdiv(w, x.lattice) + shift, tile[1]) * x.lattice
    grid = heads * tiles_x, tiles_y, batch
    return grid if max(grid[1:]) <= _MOST_PROGRAMS else (math.prod(grid),)


def _way(gpu: gpus.Gpu, layout: str, by_pointer: bool, side_by_side: bool) -> str:
    """The way to read a map of a layout. side_by_side: whether its columns are read one after the other."""
    way = gpu.way(layout, by_pointer)
    return "pointer" if way == "columns" and not side_by_side else way


def depths(query: Tensor, value: Tensor) -> dict[str, int]:
    """Channels of a head, and how many a tile holds."""
    dk, dv = query.shape[4], value.shape[4]
    return {"DK": dk, "DV": dv, "DKP": gpus.padded(dk), "DVP": gpus.padded(dv)}


def ways(**sources: Source) -> dict[str, str]:
    """The constants Q_WAY, K_WAY ... of the sources q, k ..."""
    return {f"{name.upper()}_WAY": each.way for name, each in sources.items()}


def strides(*tensors: Tensor | None) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(None if x is None else x.stride() for x in tensors)


def wide(addressed: tuple[Tensor | None, ...]) -> bool:
    """Whether offsets within one head of one image take 64 bits."""
    return any(_span(x.shape, x.stride()) >= 2**31 for x in addressed if x is not None)


@functools.lru_cache(maxsize=4096)
def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of one head of one image."""
    return sum((size - 1) * stride for size, stride in zip(shape[2:], strides[2:], strict=True))
