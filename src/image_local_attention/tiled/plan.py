"""How maps are cut: into strips of rows, each a row of tiles.

A tile of TH x TW queries sees the keys of its halo: (TH+kH-1) x (TW+kW-1) where windows slide. Large tiles compute many
scores that the window throws away, small ones copy and sum more halos and make thin products: the cheapest tile by a
small model.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from ..window import OUTSIDE, Axis, Window

MOST_SCORES = 2**19  # of one product: 2 MiB in fp32
L2_BYTES = 2**19  # of a core's second cache, where the system does not tell
SIDES = (1, 2, 4, 8, 16, 32)  # of tiles

# Nanoseconds on one core at 2.6 GHz with AVX-512, fp32; only the ratios matter.
NS_FLOP = 1 / 170  # of a product of tiles
NS_PASSES = 0.5  # per score: mask, maximum, exponential, sum
NS_RAGGED = 2.0  # per score more where a tile is no multiple of LANES queries: torch's maximum is not vectorised
NS_SEND = 0.12  # per component of a halo: into the sums of its strip
NS_READ = 1.0  # per component of a map: into its strip, or out of it
NS_MOVE = 0.15  # per component of a strip: into the next strip, or the halo of a tile that is copied
NS_CALLS = 60_000  # per strip: host time
NS_TILE = 8_000  # per tile and sum, where windows do not slide: host time
LANES = 32
THIN = 8  # a tile of this many queries multiplies at half the rate


@dataclass(frozen=True)
class Work:
    """What is to be computed, as far as the cost of a tile depends on it."""

    depth: int  # channels per head
    products: int  # of the queries and keys of a tile
    reads: int  # of maps, or writes
    key_maps: int  # of these, the ones at the keys
    sends: int  # sums over halos


class Pattern(NamedTuple):
    """How the windows of a tile lie in its halo, along one axis."""

    offsets: tuple[int, ...]  # where in the halo the window of each query begins
    displacements: tuple[int, ...]  # of each query's first key, as a bias by displacement counts them


@dataclass(frozen=True)
class Tiles:
    """The queries of an axis in tiles of `side` at most, all of one residue of `centre % dilation`.

    The halo of a tile is `length` positions, a dilation apart, among which are all keys of its queries.
    """

    axis: Axis
    side: int

    @cached_property
    def classes(self) -> tuple[tuple[int, ...], ...]:
        """The queries of each residue that has any."""
        classes: dict[int, list[int]] = {}
        for query in range(self.axis.query_count):
            classes.setdefault(self.axis.centre(query) % self.axis.dilation, []).append(query)
        return tuple(tuple(queries) for queries in classes.values())

    @cached_property
    def queries(self) -> tuple[Sequence[int], ...]:
        """Of each tile."""
        side = self.side
        if self.axis.sliding:
            total = self.axis.query_count
            return tuple(range(i, min(i + side, total)) for i in range(0, total, side))
        return tuple(queries[i : i + side] for queries in self.classes for i in range(0, len(queries), side))

    @cached_property
    def places(self) -> tuple[tuple[slice, tuple[int, ...]], ...]:
        """Where the queries of each residue are, of all tiles side by side."""
        firsts = itertools.accumulate(
            (-(-len(queries) // self.side) * self.side for queries in self.classes), initial=0
        )
        return tuple(
            (slice(first, first + len(queries)), queries) for first, queries in zip(firsts, self.classes, strict=False)
        )

    @property
    def count(self) -> int:
        return len(self.queries)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First position of each halo."""
        return tuple(self.axis.start(queries[0]) for queries in self.queries)

    @cached_property
    def length(self) -> int:
        if self.axis.sliding:
            return self.side + self.axis.kernel - 1
        spans = (self.axis.start(queries[-1]) - self.axis.start(queries[0]) for queries in self.queries)
        return max(spans) // self.axis.dilation + self.axis.kernel

    @property
    def span(self) -> int:
        """From the first position of a halo to behind the last."""
        return self.axis.dilation * (self.length - 1) + 1

    @cached_property
    def keys(self) -> tuple[tuple[int, ...], ...]:
        """Where in the map the positions of each halo are, or OUTSIDE; OUTSIDE too where no query looks."""
        kernel, dilation, halos = self.axis.kernel, self.axis.dilation, []
        for first, pattern in zip(self.starts, self.patterns, strict=True):
            seen = pattern.offsets[-1] + kernel
            halo = [self.axis.fold(first + dilation * i) for i in range(seen)]
            halos.append((*halo, *[OUTSIDE] * (self.length - seen)))
        return tuple(halos)

    @cached_property
    def outside(self) -> tuple[tuple[int, int], ...]:
        """How many positions of each halo, at its two ends, are not in the map."""
        if self.axis.sliding:
            return tuple(overhang(range(i, i + self.length), self.axis.size) for i in self.starts)
        halos = ([key == OUTSIDE for key in keys] for keys in self.keys)
        return tuple(
            (sum(itertools.takewhile(bool, halo)), sum(itertools.takewhile(bool, reversed(halo)))) for halo in halos
        )

    @cached_property
    def overhanging(self) -> tuple[tuple[int, int, int], ...]:
        """The tiles whose halos are not all in the map: (tile, how many before it, how many after)."""
        return tuple((tile, *sides) for tile, sides in enumerate(self.outside) if any(sides))

    @cached_property
    def patterns(self) -> tuple[Pattern, ...]:
        """Of each tile. What is no query goes on where queries end, so that tiles are alike if they can be."""
        return tuple(self._pattern(queries) for queries in self.queries)

    def _pattern(self, queries: Sequence[int]) -> Pattern:
        axis, none = self.axis, self.side - len(queries)
        if axis.sliding:
            return Pattern(tuple(range(self.side)), (axis.displacement(0),) * self.side)
        first, most = axis.start(queries[0]), self.length - axis.kernel
        offsets = [(axis.start(query) - first) // axis.dilation for query in queries]
        offsets += [min(offsets[-1] + i + 1, most) for i in range(none)]
        displacements = [axis.displacement(query) for query in queries]
        return Pattern(tuple(offsets), (*displacements, *displacements[-1:] * none))


@dataclass(frozen=True)
class Cover:
    """What strips and tiles cover of a map where windows slide: of one at the keys, or at `folded` queries a pixel."""

    y: Tiles
    x: Tiles
    folded: int

    @cached_property
    def columns(self) -> range:
        """What a strip covers across the map, in whole multiples of the tile's width."""
        first, width = self.x.starts[0], self.x.side
        return range(first, first + (self.x.count - 1) * width + -(-self.x.length // width) * width)

    def rows(self, strip: int) -> range:
        """What a strip covers down the map."""
        return range(self.y.starts[strip], self.y.starts[strip] + self.y.length)


@dataclass(frozen=True)
class Plan:
    """The cut of maps for a window: tiles side by side are a strip. A tile has the queries of `folded` heads."""

    window: Window
    y: Tiles
    x: Tiles
    folded: int  # heads that share a head of the keys
    group: int  # strips, of as many key heads and images, in one product
    chunk: int  # tiles of a strip in one product; all of them where group > 1

    @cached_property
    def sliding(self) -> bool:
        """Whether windows are one window moved, the same way in all tiles."""
        return self.y.axis.sliding and self.x.axis.sliding

    @cached_property
    def queries(self) -> Cover:
        y, x = (Tiles(Axis(1, tiles.axis.query_count), tiles.side) for tiles in (self.y, self.x))
        return Cover(y, x, self.folded)

    @cached_property
    def keys(self) -> Cover:
        return Cover(self.y, self.x, 1)

    @cached_property
    def scores(self) -> tuple[int, int]:
        """M queries and K keys of a tile, both numbered column by column."""
        return self.folded * self.y.side * self.x.side, self.y.length * self.x.length

    @property
    def strips(self) -> range:
        return range(self.y.count)

    @cached_property
    def chunks(self) -> tuple[range, ...]:
        """Tiles of a strip that one product takes."""
        return tuple(range(i, min(i + self.chunk, self.x.count)) for i in range(0, self.x.count, self.chunk))

    @cached_property
    def alike(self) -> dict[range, tuple[tuple[slice, Pattern], ...]]:
        """For each chunk its tiles, those of one pattern together."""
        return {chunk: tuple(_runs(self.x.patterns[chunk.start : chunk.stop])) for chunk in self.chunks}


def cut(window: Window, queries: tuple[int, int], size: tuple[int, int], folded: int, maps: int, work: Work) -> Plan:
    """The cheapest plan for `maps` heads and images of keys of a size, each for `folded` heads of queries."""
    return _cut(window, queries, size, folded, maps, work, scores_in_cache(torch.get_num_threads()))


@functools.cache
def scores_in_cache(threads: int) -> int:
    """Scores of one product in fp32, for the passes over them to stay in the second caches of the threads' cores."""
    told = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")  # as "2048K", on Linux
    try:
        l2_bytes = int(told.read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        l2_bytes = L2_BYTES
    return min(MOST_SCORES, threads * l2_bytes // 4)


@functools.lru_cache(maxsize=256)
def _cut(
    window: Window,
    queries: tuple[int, int],
    size: tuple[int, int],
    folded: int,
    maps: int,
    work: Work,
    scores: int,
) -> Plan:
    plans = _plans(window, window.axes(size, queries), folded, maps, scores)
    return min(plans, key=lambda plan: _cost(plan, work))


def _plans(window: Window, axes: tuple[Axis, Axis], folded: int, maps: int, scores: int) -> Iterator[Plan]:
    ways = ([Tiles(axis, side) for side in SIDES if side < 2 * axis.query_count] for axis in axes)
    for y, x in itertools.product(*ways):
        one = Plan(window, y, x, folded, 1, 1)
        tiles = max(1, scores // math.prod(one.scores))
        yield Plan(window, y, x, folded, max(1, min(maps, tiles // x.count)), share(x.count, tiles))


def _cost(plan: Plan, work: Work) -> float:
    """Of the strips of one head and image."""
    (m, k), d, pixels = plan.scores, work.depth, plan.y.side * plan.x.side
    per_score = NS_PASSES + (NS_RAGGED if m % LANES else 0.0) + work.products * 2 * d * NS_FLOP * (1 + THIN / m)
    read = (work.reads - work.key_maps) * m + work.key_maps * pixels
    moved = work.key_maps * plan.x.side * (plan.y.length - plan.y.side)
    calls = len(plan.chunks) * NS_CALLS / plan.group
    if not plan.sliding:
        read += moved  # rows that strips share are read again
        moved = work.key_maps * k
        calls += plan.x.count * (1 + work.sends) * NS_TILE / plan.group
    per_tile = m * k * per_score + d * (k * work.sends * NS_SEND + read * NS_READ + moved * NS_MOVE)
    return plan.y.count * (plan.x.count * per_tile + calls)


def _runs(patterns: Sequence[Pattern]) -> Iterator[tuple[slice, Pattern]]:
    first = 0
    for pattern, run in itertools.groupby(patterns):
        last = first + len(list(run))
        yield slice(first, last), pattern
        first = last


def share(total: int, most: int) -> int:
    """The size of equal shares of a total, each of them `most` or less."""
    return -(-total // -(-total // most))


def overhang(pixels: range, size: int) -> tuple[int, int]:
    """How many pixels lie before a map of a size, and how many after."""
    return min(max(-pixels.start, 0), len(pixels)), min(max(pixels.stop - size, 0), len(pixels))
