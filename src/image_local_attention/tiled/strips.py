"""Strips of maps, the tiles in them, and the sums that tiles send to their halos.

A strip of some rows of a map is stored column by column, [b, h, columns, rows, D], in the dtype of sums. Whatever a
tile covers of it, itself or its halo, is then a run of whole columns: all tiles of a strip are one overlapping view
[tiles, pixels, D], which products take as it is.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .plan import Cover, Plan, overhang, share


def parts(plan: Plan, *maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The maps [B, heads, ...] in parts [b, h, ...] of about one size, at most `plan.group` heads and images."""
    batch, heads = maps[0].shape[:2]
    h = share(heads, plan.group)
    b = share(batch, plan.group // heads) if h == heads else 1
    for i in range(0, batch, b):
        for j in range(0, heads, h):
            yield tuple(x[i : i + b, j : j + h] for x in maps)


def multiply(a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> None:
    """out = factor * a @ b of batched matrices, where `out` or its transpose is contiguous."""
    if not out.is_contiguous():
        a, b, out = b.mT, a.mT, out.mT
    if factor == 1.0:
        torch.bmm(a, b, out=out)
    else:
        torch.baddbmm(out, a, b, beta=0, alpha=factor, out=out)


def inside(strip: Tensor, x: Tensor, columns: range, rows: range) -> tuple[Tensor, Tensor]:
    """The part of a strip that lies in the map `x` [b, h, W, H, D], and the same pixels of the map."""
    for axis, pixels in ((2, columns), (3, rows)):
        before, after = overhang(pixels, x.shape[axis])
        length = max(len(pixels) - before - after, 0)
        strip = strip.narrow(axis, before if length else 0, length)
        x = x.narrow(axis, pixels.start + before if length else 0, length)
    return strip, x


class Strip:
    """A strip of a map [b, h, H, W, D]; strips come from top to bottom."""

    def __init__(self, cover: Cover, x: Tensor, like: Tensor):
        self.cover = cover
        self.x = x.transpose(2, 3)
        b, h, _, _, depth = x.shape
        self.pixels = like.new_zeros((b, h, len(cover.columns), cover.halo[0], depth))
        self.kept = cover.halo[0] - cover.tile[0]  # rows that the next strip covers too
        self.spare = torch.zeros_like(self.pixels) if self.kept else self.pixels

    def load(self, first: int) -> None:
        """Reads what the strip covers whose queries begin at row `first`; 0 outside of the map."""
        kept = self.kept if first else 0
        if kept:
            self.move_on()
        rows = self.cover.rows(first)[kept:]
        strip = self.pixels[:, :, :, kept:]
        if any(overhang(rows, self.x.shape[3])):
            strip.zero_()
        strip, pixels = inside(strip, self.x, self.cover.columns, rows)
        strip.copy_(pixels)

    def store(self, rows: range) -> None:
        """Writes the first rows of the strip, which are `rows` of the map."""
        strip, pixels = inside(self.pixels[:, :, :, : len(rows)], self.x, self.cover.columns, rows)
        pixels.copy_(strip)

    def move_on(self) -> None:
        """Moves the rows that the next strip covers too to its top."""
        self.spare[:, :, :, : self.kept] = self.pixels[:, :, :, self.cover.tile[0] :]
        self.pixels, self.spare = self.spare, self.pixels

    def tiles(self, chunk: range) -> Tensor:
        """What some tiles cover, [N, pixels, D]; a view, or where tiles overlap and maps are several a copy."""
        (height, width), depth = self.cover.halo, self.pixels.shape[-1]
        step = self.cover.tile[1] * height * depth
        maps, length = self.pixels.shape[:2].numel(), self.pixels.shape[2:].numel()
        shape, strides = (maps, len(chunk), height * width, depth), (length, step, depth, 1)
        return self.pixels.as_strided(shape, strides, chunk.start * step).flatten(0, 1)


class Sums(Strip):
    """Sums, over the tiles of a map, of what each sends to its halo.

    Once a strip has sent, the rows that no later strip covers are final and go to the map. The order of the sums is
    fixed.
    """

    def __init__(self, plan: Plan, x: Tensor, like: Tensor):
        super().__init__(plan.keys, x, like)
        self.last = plan.strips[-1]
        height, width = plan.keys.halo
        self.halos = like.new_empty((*x.shape[:2], plan.chunk, width, height, x.shape[-1]))

    def send(self, chunk: range, weight: Tensor, vector: Tensor, factor: float = 1.0) -> None:
        """Adds factor * weight^T @ vector, of [N, M, K] and [N, M, D], to the halos of some tiles."""
        halos = self.halos[:, :, : len(chunk)]  # [b, h, tiles, C, R, D]
        multiply(weight.mT, vector, halos.flatten(3, 4).flatten(0, 2), factor)
        width = self.cover.tile[1]
        tiles = self.pixels.unflatten(2, (-1, width))  # [b, h, tiles + ..., TW, R, D]
        for i, left in enumerate(range(0, self.cover.halo[1], width)):
            part = halos[:, :, :, left : left + width]
            tiles[:, :, chunk.start + i : chunk.stop + i, : part.shape[3]] += part

    def flush(self, first: int) -> None:
        """Ends the strip whose queries begin at row `first`."""
        rows, height = self.cover.rows(first), self.cover.tile[0]
        self.store(rows if first == self.last else rows[:height])
        if self.kept:
            self.move_on()
        self.pixels[:, :, :, self.kept :] = 0.0
