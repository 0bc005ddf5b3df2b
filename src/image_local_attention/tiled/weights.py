"""Weights [b, h, folded, H, W, slots] of the windows, and the dense scores [N, M, K] of tiles: each from the other."""

from collections.abc import Iterator

from torch import Tensor

from .gathered import QueryStrip
from .plan import Plan
from .scores import alike, by_pixel, slot_keys, taking_part


def weight_strip(plan: Plan, weight: Tensor, like: Tensor) -> "SlidingWeights | GatheredWeights":
    return (SlidingWeights if plan.sliding else GatheredWeights)(plan, weight, like)


class SlidingWeights:
    """Where windows slide: both are views of each other's shape, and weights are read and written in their map."""

    def __init__(self, plan: Plan, weight: Tensor, like: Tensor):
        self.plan = plan
        self.weight = weight

    def load(self, strip: int) -> None:
        """Weights stay where they are."""

    def store(self, strip: int) -> None:
        """Weights are there already."""

    def take(self, scores: Tensor, chunk: range, strip: int, absent: float) -> None:
        """Weights of the scores of some tiles; `absent` where a slot does not take part."""
        for slots, there in self._in_map(scores, chunk, strip):
            there.copy_(slots)
            fill_dropped(there, self.plan, absent)

    def put(self, scores: Tensor, chunk: range, strip: int) -> None:
        """Scores of the weights of some tiles; 0 out of window and for what is no query.

        `scores` holds other such tiles, or zeros.
        """
        y, x = self.plan.y, self.plan.x
        if len(y.queries[strip]) < y.side or len(x.queries[chunk[-1]]) < x.side:
            scores.zero_()
        for slots, there in self._in_map(scores, chunk, strip):
            slots.copy_(there)
            fill_dropped(slots, self.plan, 0.0)

    def _in_map(self, scores: Tensor, chunk: range, strip: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The windows in the scores of tiles, where their queries lie in the map, and the weights there.

        Two pairs of views [b, h, tiles, TW, folded, TH, kH, kW] at most: the whole tiles, and the rest to their right.
        """
        rows, width = self.plan.y.queries[strip], self.plan.x.side
        pixels = self.weight[:, :, :, rows[0] : rows[-1] + 1, chunk.start * width : chunk.stop * width]
        pixels = pixels.unflatten(-1, self.plan.window.kernel)  # [b, h, folded, rows, columns, kH, kW]
        pixels = pixels.permute(0, 1, 4, 2, 3, 5, 6)  # [b, h, columns, folded, rows, kH, kW]
        tiles = self._windows(scores).unflatten(0, (*self.weight.shape[:2], len(chunk)))[:, :, :, :, :, : len(rows)]
        whole, rest = divmod(pixels.shape[2], width)
        if whole:
            yield tiles[:, :, :whole], pixels[:, :, : whole * width].unflatten(2, (whole, width))
        if rest:
            yield tiles[:, :, whole, :rest], pixels[:, :, whole * width :]

    def _windows(self, scores: Tensor) -> Tensor:
        """The scores that lie in the windows, as a view [N, TW, folded, TH, kH, kW].

        Query (y, x) of a tile sees the keys (y + i, x + j) of its halo.
        """
        plan = self.plan
        height, halo_height = plan.y.side, plan.y.length
        n, m, k = scores.stride()
        strides = n, plan.folded * height * m + halo_height * k, height * m, m + k, k, halo_height * k
        shape = len(scores), plan.x.side, plan.folded, height, *plan.window.kernel
        return scores.as_strided(shape, strides)


class GatheredWeights(QueryStrip):
    """Where they do not: by the key of each slot, through a strip."""

    def take(self, scores: Tensor, chunk: range, strip: int, absent: float) -> None:
        """Weights of the scores of some tiles; `absent` where a slot does not take part."""
        pixels = self.pixels.unflatten(2, (self.plan.x.count, -1))[:, :, chunk.start : chunk.stop]
        for run, tiles, keys in self._alike(scores, chunk, strip):
            part = pixels[:, :, run]  # [b, h, tiles, TW, folded, TH, slots]
            part[..., : keys.shape[-1]] = tiles.gather(-1, keys).view(*part.shape[:-1], -1)
            part[..., keys.shape[-1] :] = absent

    def put(self, scores: Tensor, chunk: range, strip: int) -> None:
        """Scores of the weights of some tiles; 0 out of window and for what is no query."""
        pixels = self.pixels.unflatten(2, (self.plan.x.count, -1))[:, :, chunk.start : chunk.stop]
        scores.zero_()
        for run, tiles, keys in self._alike(scores, chunk, strip):
            tiles.scatter_(-1, keys, pixels[:, :, run, ..., : keys.shape[-1]].flatten(0, 1))

    def _alike(self, scores: Tensor, chunk: range, strip: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Tiles of one pattern: which, their scores [b*h, tiles, TW, folded, TH, K], and their slots' keys."""
        for (run, _), (tiles, patterns) in zip(
            self.plan.alike[chunk], alike(scores, self.plan, chunk, strip), strict=True
        ):
            tiles = by_pixel(tiles, self.plan)
            keys = slot_keys(self.plan, patterns, scores.device)[:, None]
            yield run, tiles, keys.expand(*tiles.shape[:5], -1)


def fill_dropped(slots: Tensor, plan: Plan, value: float) -> None:
    """Sets those of [..., kH, kW] that do not take part for coming after the query in raster order."""
    if plan.window.raster:
        row, column = divmod(taking_part(plan.window) - 1, plan.window.kernel[1])  # the last that does
        slots[..., row, column + 1 :] = value
        slots[..., row + 1 :, :] = value
