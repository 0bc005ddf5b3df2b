"""Strips of maps where windows do not slide: they shift, fold, dilate, or queries and keys lie on two grids.

Queries lie in a strip tile by tile, [b, h, tiles*TW, folded, TH, D]. Keys lie in it column by column in the order of
the axis, [b, h, columns, 1, R, D], columns out of the map included; the halos of some tiles are copies side by side.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..window import FOLDING
from .plan import Plan
from .products import multiply

Where = slice | Tensor


@functools.lru_cache(maxsize=1024)
def tensor(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers on a device. They are few, and kept, so that no copy waits for the device."""
    return torch.tensor(numbers, device=device)


def where(numbers: Sequence[int], device: torch.device) -> Where:
    """What selects entries of these numbers: a slice if they are at one distance from each other."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    last = numbers[0] + step * (len(numbers) - 1)
    if step > 0 and list(numbers) == list(range(numbers[0], last + 1, step)):
        return slice(numbers[0], last + 1, step)
    return tensor(tuple(numbers), device)


def layers(targets: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Places of targets, and these, in lists in which no target is twice, so that adding to them has one order."""
    result: list[tuple[list[int], list[int]]] = []
    for place, target in enumerate(targets):
        places, there = next((layer for layer in result if target not in layer[1]), ([], []))
        if not places:
            result.append((places, there))
        places.append(place)
        there.append(target)
    return result


class QueryStrip:
    """A strip of a map [b, h, folded, H, W, D] at the queries. `fill` is where a tile has no query."""

    def __init__(self, plan: Plan, x: Tensor, like: Tensor, fill: float = 0.0):
        self.plan = plan
        self.fill = fill
        self.x = x.transpose(3, 4)
        b, h, folded, _, _, depth = x.shape
        self.pixels = like.new_full((b, h, plan.x.count * plan.x.side, folded, plan.y.side, depth), fill)
        self.columns = [(place, where(queries, x.device)) for place, queries in plan.x.places]

    def load(self, strip: int) -> None:
        """Reads what a strip covers."""
        there = len(self.plan.y.queries[strip])
        if there < self.plan.y.side:
            self.pixels[:, :, :, :, there:] = self.fill
        for pixels, place in self._places(strip):
            pixels.copy_(self.x[place])

    def store(self, strip: int) -> None:
        """Writes a strip to the map."""
        for pixels, place in self._places(strip):
            self.x[place] = pixels.to(self.x.dtype)

    def _places(self, strip: int) -> list[tuple[Tensor, tuple]]:
        """Parts of the strip that hold queries of one residue, [b, h, folded, columns, rows, D], and what they are."""
        queries = self.plan.y.queries[strip]
        rows, every = where(queries, self.x.device), slice(None)
        pixels = self.pixels.transpose(2, 3)[:, :, :, :, : len(queries)]
        grids = ((place, (_across(columns, rows), rows)) for place, columns in self.columns)
        return [(pixels[:, :, :, place], (every, every, every, *grid)) for place, grid in grids]

    def tiles(self, chunk: range) -> Tensor:
        """Some tiles, [N, pixels, D]; a view, or where they are a part of several maps a copy."""
        tiles = self.pixels.unflatten(2, (self.plan.x.count, -1))[:, :, chunk.start : chunk.stop]
        return tiles.flatten(3, 5).flatten(0, 2)


def _across(columns: Where, rows: Where) -> Where:
    both = isinstance(columns, Tensor) and isinstance(rows, Tensor)
    return columns[:, None] if both else columns


class KeyStrip:
    """A strip of a map [b, h, 1, H, W, D] at the keys, 0 outside of the map."""

    def __init__(self, plan: Plan, x: Tensor, like: Tensor):
        self.plan = plan
        self.x = x.squeeze(2).transpose(2, 3)  # [b, h, W, H, D]
        b, h, _, _, size, depth = x.shape
        halos = [range(first, first + plan.x.span, plan.x.axis.dilation) for first in plan.x.starts]
        self.first = min(0, *(halo[0] for halo in halos))  # position of the strip's first column
        last = max(size - 1, *(halo[-1] for halo in halos))
        self.pixels = like.new_zeros((b, h, last + 1 - self.first, plan.y.length, depth))
        self.map = slice(-self.first, size - self.first)  # its columns in the map
        self.sides = self._sides() if plan.x.axis.border in FOLDING else []
        columns = [range(halo.start - self.first, halo.stop - self.first, halo.step) for halo in halos]
        self.halos = [slice(halo.start, halo.stop, halo.step) for halo in columns]
        self.index = tensor(tuple(itertools.chain(*columns)), x.device)  # [tiles * C]

    def _sides(self) -> list[tuple[slice, tuple[int, ...]]]:
        """The columns out of the map, and which of the strip's columns they are."""
        axis = self.plan.x.axis
        before, after = axis.overhang
        sides = (range(-before, 0), range(axis.size, axis.size + after))
        return [
            (slice(side.start - self.first, side.stop - self.first), tuple(axis.fold(i) - self.first for i in side))
            for side in sides
            if side
        ]

    def load(self, strip: int) -> None:
        """Reads what a strip covers."""
        rows, pixels = self._rows(strip)
        if len(rows) < self.plan.y.length:
            self.pixels.zero_()
        if not rows:
            return
        keys = self.plan.y.keys[strip][rows.start : rows.stop]
        pixels[:, :, self.map].copy_(self.x[:, :, :, where(keys, self.x.device)])
        for side, columns in self.sides:
            pixels[:, :, side] = pixels.index_select(2, tensor(columns, self.x.device))

    def _rows(self, strip: int) -> tuple[range, Tensor]:
        """The rows of a strip that are in the map."""
        top, bottom = self.plan.y.outside[strip]
        rows = range(top, max(self.plan.y.length - bottom, top))
        return rows, self.pixels[:, :, :, rows.start : rows.stop]

    def tiles(self, chunk: range) -> Tensor:
        """The halos of some tiles, [N, pixels, D], a copy."""
        length = self.plan.x.length
        index = self.index[chunk.start * length : chunk.stop * length]
        return self.pixels.index_select(2, index).unflatten(2, (len(chunk), length)).flatten(3, 4).flatten(0, 2)


class Sums(KeyStrip):
    """Sums, over the tiles of a map at the keys, of what each sends to its halo. The order of the sums is fixed.

    Strips reach the map in any order: where it has not the dtype of sums, they are summed in a map that has.
    """

    def __init__(self, plan: Plan, x: Tensor, like: Tensor):
        super().__init__(plan, x, like)
        self.total = self.x.zero_() if x.dtype == like.dtype else torch.zeros_like(self.x, dtype=like.dtype)
        self.buffer = like.new_empty((*x.shape[:2], plan.chunk, plan.x.length, plan.y.length, x.shape[-1]))

    def send(self, chunk: range, weight: Tensor, vector: Tensor, factor: float = 1.0) -> None:
        """Adds factor * weight^T @ vector, of [N, M, K] and [N, M, D], to the halos of some tiles."""
        halos = self.buffer[:, :, : len(chunk)]  # [b, h, tiles, C, R, D]
        multiply(weight.mT, vector, halos.flatten(3, 4).flatten(0, 2), factor)
        for i, tile in enumerate(chunk):
            self.pixels[:, :, self.halos[tile]] += halos[:, :, i]

    def flush(self, strip: int) -> None:
        """Ends a strip."""
        rows, pixels = self._rows(strip)
        device = self.x.device
        for side, columns in self.sides:
            for places, there in layers(columns):
                pixels[:, :, where(there, device)] += pixels[:, :, side][:, :, where(places, device)]
        for places, there in layers(self.plan.y.keys[strip][rows.start : rows.stop]):
            self.total[:, :, :, where(there, device)] += pixels[:, :, self.map][:, :, :, where(places, device)]
        self.pixels.zero_()
        if strip == self.plan.strips[-1] and self.total is not self.x:
            self.x.copy_(self.total)
