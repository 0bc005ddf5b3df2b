"""How maps are cut: into strips of rows, each a row of tiles.

A tile of TH x TW queries sees the (TH+kH-1) x (TW+kW-1) keys of its halo. Large tiles compute many scores that the
window throws away, small ones copy and sum more halos and make thin products: the cheapest tile by a small model.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ..window import Axis, Window

SCORES = 2**18  # of one product: 1 MiB in fp32, so that the passes over them stay in cache
SIDES = (1, 2, 4, 8, 16, 32)  # of tiles

# Nanoseconds on one core at 2.6 GHz with AVX-512, fp32; only the ratios matter.
NS_FLOP = 1 / 170  # of a product of tiles
NS_PASSES = 0.5  # per score: mask, maximum, exponential, sum
NS_RAGGED = 2.0  # per score more where a tile is no multiple of LANES queries: torch's maximum is not vectorised
NS_SEND = 0.12  # per component of a halo: into the sums of its strip
NS_READ = 1.0  # per component of a map: into its strip, or out of it
NS_MOVE = 0.15  # per component of a strip: into the next strip
NS_CALLS = 60_000  # per strip: host time
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


@dataclass(frozen=True)
class Cover:
    """What strips and tiles cover of a map: of one at the queries where the axes see a key each, else at the keys."""

    axes: tuple[Axis, Axis]
    tile: tuple[int, int]
    count: int

    @cached_property
    def halo(self) -> tuple[int, int]:
        """Height and width of what a tile covers."""
        return len(self.rows(0)), len(self.tile_columns(0))

    @cached_property
    def columns(self) -> range:
        """What a strip covers across the map, in whole multiples of the tile's width."""
        first, width = self.axes[1].start(0), self.tile[1]
        return range(first, first + (self.count - 1) * width + -(-self.halo[1] // width) * width)

    def tile_columns(self, tile: int) -> range:
        """What a tile of a strip covers across the map."""
        return self.axes[1].keys(tile * self.tile[1], self.tile[1])

    @cached_property
    def overhanging(self) -> tuple[tuple[int, int, int], ...]:
        """The tiles of a strip that cover columns outside of the map: (tile, how many to its left, to its right)."""
        sides = ((tile, *overhang(self.tile_columns(tile), self.axes[1].size)) for tile in range(self.count))
        return tuple(side for side in sides if any(side[1:]))

    def rows(self, first: int) -> range:
        """What the strip whose queries begin at row `first` covers down the map."""
        return self.axes[0].keys(first, self.tile[0])


@dataclass(frozen=True)
class Plan:
    """The cut of maps of `size` (H, W) for a window: `count` tiles of `tile` (TH, TW) side by side are a strip."""

    window: Window
    size: tuple[int, int]
    tile: tuple[int, int]
    group: int  # strips, of as many heads and images, in one product
    chunk: int  # tiles of a strip in one product; all of them where group > 1

    @property
    def count(self) -> int:
        return -(-self.size[1] // self.tile[1])

    @cached_property
    def queries(self) -> Cover:
        return Cover(Window((1, 1)).axes(self.size), self.tile, self.count)

    @cached_property
    def keys(self) -> Cover:
        return Cover(self.window.axes(self.size), self.tile, self.count)

    @property
    def scores(self) -> tuple[int, int]:
        """M queries and K keys of a tile."""
        return math.prod(self.tile), math.prod(self.keys.halo)

    @property
    def strips(self) -> range:
        """First rows of the strips."""
        return range(0, self.size[0], self.tile[0])

    @cached_property
    def chunks(self) -> tuple[range, ...]:
        """Tiles of a strip that one product takes."""
        return tuple(range(i, min(i + self.chunk, self.count)) for i in range(0, self.count, self.chunk))


@functools.lru_cache(maxsize=256)
def cut(window: Window, size: tuple[int, int], maps: int, work: Work) -> Plan:
    """The cheapest plan for `maps` heads and images of a size."""
    return min(_plans(window, size, maps), key=lambda plan: _cost(plan, work))


def _plans(window: Window, size: tuple[int, int], maps: int) -> Iterator[Plan]:
    heights, widths = ([side for side in SIDES if side < 2 * n] for n in size)
    for height in heights:
        for width in widths:
            one = Plan(window, size, (height, width), 1, 1)
            tiles = max(1, SCORES // math.prod(one.scores))
            yield Plan(window, size, one.tile, max(1, min(maps, tiles // one.count)), share(one.count, tiles))


def _cost(plan: Plan, work: Work) -> float:
    """Of a strip, per row."""
    (height, width), (m, k), d = plan.tile, plan.scores, work.depth
    per_score = NS_PASSES + (NS_RAGGED if m % LANES else 0.0) + work.products * 2 * d * NS_FLOP * (1 + THIN / m)
    moved = work.key_maps * width * (plan.keys.halo[0] - height)
    per_tile = m * k * per_score + d * (k * work.sends * NS_SEND + m * work.reads * NS_READ + moved * NS_MOVE)
    return (plan.count * per_tile + len(plan.chunks) * NS_CALLS / plan.group) / height


def share(total: int, most: int) -> int:
    """The size of equal shares of a total, each of them `most` or less."""
    return -(-total // -(-total // most))


def overhang(pixels: range, size: int) -> tuple[int, int]:
    """How many pixels lie before a map of a size, and how many after."""
    return min(max(-pixels.start, 0), len(pixels)), min(max(pixels.stop - size, 0), len(pixels))
