"""From maps to a kernel launch: the plan, the ways to read them, the grid and the constants that follow."""

import functools
import math
from copy import copy
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor

from ..rules import Rules
from ..window import Axis, Window
from . import gpu as gpus
from . import plan, remembered
from .context import bind_thread
from .geometry import Span, images, spans
from .integers import cdiv
from .source import Source, column_step, layout_of, source
from .table import ceiling, table

LOG2E = 1.4426950408889634
MOST_PROGRAMS = 65_535  # on the second and third axis of a grid
STRIP_BYTES = 2**24  # of the maps that a row of a strip's tiles reads: a part of the L2 cache
WINDOWS_OF_A_STRIP = 4  # side by side, at least


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


class Arrangement(NamedTuple):
    """How a plan reads maps: `ways` of the kept, then of the streamed ones, and `block` pixels of these a step.

    Tiles are shifted left by `shift` columns, and halos begin `pad` columns early where their blocks cover these
    anyway, so that copies begin where they are cheap as long as windows slide; where they do not, halos begin on
    multiples of `align` columns.
    """

    ways: tuple[str, ...]
    block: tuple[int, int]
    shift: int
    pad: int
    align: int


# Every call of a model asks for the same few.
@functools.lru_cache(maxsize=4096)
def _arranged(
    chosen: plan.Plan,
    gpu: gpus.Gpu,
    spans: tuple[Span, Span],
    kept: tuple[str, ...],
    streamed: tuple[str, ...],
    element_size: int,
    transposed: bool,
) -> Arrangement:
    """kept, streamed: layouts of the maps. transposed: tiles are of keys."""
    y, x = spans
    scattered = y.lattice * x.lattice > 1
    folded = not transposed and (y.folds or x.folds)
    side_by_side = x.lattice == 1 and not folded
    by_pointer = chosen.stream_by_pointer or scattered or folded
    streamed_ways = [_way(gpu, each, by_pointer, side_by_side) for each in streamed]
    tile_w = chosen.tile[1]
    step, vector = (
        max((column_step(element_size, way, wide) for way in streamed_ways), default=1) for wide in (tile_w, 1)
    )
    pad = shift = 0
    if not (x.scaled or (transposed and x.folds)):
        lead = x.reach - 1 - x.lead if transposed else x.lead
        pad = chosen.free_columns(x.reach, -lead % vector, step)
        shift = -(lead + pad) % step

    def way_to_keep(layout: str) -> str:
        """A descriptor where tiles begin and end on whole vectors of a map's columns."""
        way = _way(gpu, layout, chosen.keep_by_pointer or scattered, side_by_side)
        vector = column_step(element_size, way, 1)
        return way if tile_w % vector == 0 and shift % vector == 0 else "pointer"

    ways = *map(way_to_keep, kept), *streamed_ways
    return Arrangement(ways, chosen.block_shape(x.reach + pad, step), shift, pad, step)


class Launch:
    """A launch over maps [B, heads, H, W, D]: each program keeps a tile of some and streams the halo of others.

    tiles: (batch, heads, height, width) of the grid that is taken apart into tiles. transposed: these are of keys, and
    the halo is of queries. `sources` are those of the kept, then of the streamed maps.
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
        self.first, self.tiles, self.transposed = maps[0], tiles, transposed
        gpu = gpus.of(self.first.device)
        layouts = tuple(map(layout_of, maps))
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
        apart = y.lattice * x.lattice > 1 or (not transposed and (y.folds or x.folds))
        chosen = task, product, depth, x.reach, planes, problem.facts if apart else problem.facts | {"copies"}
        self.plan = plan.INTERPRETED if gpu.interpreted else remembered.choose(self.first.device, *chosen)

        geometry = self.spans, kept_layouts, streamed_layouts, self.first.element_size(), transposed
        self.arrangement = arranged = _arranged(self.plan, gpu, *geometry)
        shapes = [self.plan.tile] * len(kept) + [arranged.block] * len(streamed)
        self.sources = [source(*each) for each in zip(maps, shapes, arranged.ways, strict=True)]
        self._window = (self.plan.tile[0] + y.reach - 1) * y.lattice, x.reach * x.lattice
        self._pixel_bytes = sum(each.shape[1] * each.shape[4] * each.element_size() for each in streamed)
        self.on_nvidia = gpu.nvidia and self.first.is_cuda
        self.limits = {"maxnreg": self.plan.max_registers} if gpu.nvidia and self.plan.max_registers else {}
        self.constants = problem.constants | {
            "TH": self.plan.tile[0],
            "TW": self.plan.tile[1],
            "ROWS": arranged.block[0],
            "COLS": arranged.block[1],
            "SHIFT": arranged.shift,
            "PAD": arranged.pad,
            "ALIGN": arranged.align,
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
            grid = tile_grid(self.tiles, self.plan.tile, self.arrangement.shift, self.spans)
            heads = self.tiles[1]
            strip = heads * strip_tiles(grid[0] // heads, self.plan.tile[1], self._window, self._pixel_bytes)
            constants |= {"FLAT": len(grid) == 1, "STRIP": 0 if len(grid) == 1 else strip}
        with torch.cuda.device_of(self.first):
            if self.on_nvidia:
                bind_thread()
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
    return grid if max(grid[1:]) <= MOST_PROGRAMS else (math.prod(grid),)


def strip_tiles(across: int, tile: int, window: tuple[int, int], pixel_bytes: int) -> int:
    """How many of the tiles `across` a map make up a strip, 0 for all of them.

    What a row of a strip's tiles reads stays in the L2 cache until the next row reads it again. Strips that are not
    much wider than a window would read more than they save. tile: its columns. window: rows that a tile reads, and
    columns of a pixel's window. pixel_bytes: of all maps that are read, and all their heads.
    """
    rows, cols = window
    tiles = STRIP_BYTES // (rows * tile * pixel_bytes)
    return tiles if tiles < across and tiles * tile >= WINDOWS_OF_A_STRIP * cols else 0


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
