"""Scores [N, M, K] between the queries of N tiles and the keys of their halos, and which of them count.

Tiles, queries and keys are numbered column by column: N is [b, h, tiles], M is [TW, folded, TH], K is [C, R].
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..window import Window
from .gathered import tensor
from .plan import Pattern, Plan
from .products import multiply
from .strips import key_strip

KEPT = 2**20  # numbers, of terms that are kept for tiles of the same patterns
Patterns = tuple[Pattern, Pattern]  # y, x


def alike(scores: Tensor, plan: Plan, chunk: range, strip: int) -> Iterator[tuple[Tensor, Patterns]]:
    """The scores of some tiles, those of one pattern at a time: views [b*h, tiles, M, K]."""
    y, runs = plan.y.patterns[strip], plan.alike[chunk]
    tiles = scores.unflatten(0, (-1, len(chunk)))
    if len(runs) == 1:
        yield tiles, (y, runs[0][1])
        return
    for run, x in runs:
        yield tiles[:, run], (y, x)


def by_pixel(x: Tensor, plan: Plan) -> Tensor:
    """[..., M, K] -> [..., TW, folded, TH, K], a view."""
    return x.unflatten(-2, (plan.x.side, plan.folded, plan.y.side))


def taking_part(window: Window) -> int:
    """How many slots, from the first, are not dropped for coming after the query in raster order."""
    if not window.raster:
        return window.slots
    height, width = window.kernel
    return sum(not window.dropped(i, j) for i in range(height) for j in range(width))


def slot_keys(plan: Plan, patterns: Patterns, device: torch.device) -> Tensor:
    """[TW, TH, slots]: the key of the halo in each slot that takes part, for each query."""
    y, x = (pattern.offsets for pattern in patterns)
    return _grid(plan.window, y, x, 1, plan.y.length, device)


def slot_displacements(plan: Plan, patterns: Patterns, device: torch.device) -> Tensor:
    """[TW, TH, slots]: the entry of a bias by displacement for each slot that takes part, for each query."""
    y, x = (pattern.displacements for pattern in patterns)
    return _grid(plan.window, y, x, 2 * plan.window.kernel[1] - 1, 1, device)


def _grid(
    window: Window, y: tuple[int, ...], x: tuple[int, ...], row: int, column: int, device: torch.device
) -> Tensor:
    """(y + i) * row + (x + j) * column for slot (i, j)."""
    y, x = (
        tensor(first, device)[:, None] + torch.arange(n, device=device)
        for first, n in zip((y, x), window.kernel, strict=True)
    )
    entries = (y * row)[None, :, :, None] + (x * column)[:, None, None, :]  # [TW, TH, kH, kW]
    return entries.flatten(2)[:, :, : taking_part(window)]


class Terms:
    """What is added to the logits of tiles: the bias [h, folded, entries] of each slot, -inf out of the window."""

    def __init__(self, plan: Plan, bias: Tensor | None, by_displacement: bool, like: Tensor):
        self.plan = plan
        self.bias = None if bias is None else bias.to(like.dtype)
        self.by_displacement = by_displacement
        self.like = like
        maps = 1 if bias is None else len(bias)
        self.most = max(1, KEPT // (maps * plan.scores[0] * plan.scores[1]))
        self.kept: dict[Patterns, Tensor] = {}

    def add(self, scores: Tensor, chunk: range, strip: int) -> None:
        """Adds them to the scores [N, M, K] of some tiles."""
        for tiles, patterns in alike(scores, self.plan, chunk, strip):
            term = self.of(patterns)  # [h or 1, M, K]
            if len(term) > 1:
                tiles, term = tiles.unflatten(0, (-1, len(term))), term[:, None]
            tiles += term

    def of(self, patterns: Patterns) -> Tensor:
        """[h or 1, M, K] of a tile; those of the latest patterns are kept."""
        term = self.kept.pop(patterns, None)
        if term is None:
            if len(self.kept) == self.most:
                del self.kept[next(iter(self.kept))]
            term = self._term(patterns)
        self.kept[patterns] = term
        return term

    def _term(self, patterns: Patterns) -> Tensor:
        """[h or 1, M, K] of a tile, stored key by key."""
        plan, bias, device = self.plan, self.bias, self.like.device
        keys = slot_keys(plan, patterns, device)[None, :, None]  # [1, TW, 1, TH, slots]
        maps = 1 if bias is None else len(bias)
        term = self.like.new_full((maps, plan.scores[1], plan.scores[0]), float("-inf")).mT
        pixels = by_pixel(term, plan)  # [h, TW, folded, TH, K]
        keys = keys.expand(*pixels.shape[:4], -1)
        if bias is None:
            pixels.scatter_(-1, keys, 0.0)
        elif self.by_displacement:
            slots = bias[:, :, slot_displacements(plan, patterns, device)]  # [h, folded, TW, TH, slots]
            pixels.scatter_(-1, keys, slots.transpose(1, 2))
        else:
            slots = bias[:, None, :, None, : keys.shape[-1]]
            pixels.scatter_(-1, keys, slots.expand(keys.shape))
        return term


class BiasSums:
    """Sums of scores into the gradient [h, folded, entries] of a bias. Their order is fixed."""

    def __init__(self, plan: Plan, total: Tensor, by_displacement: bool):
        self.plan = plan
        self.total = total
        self.by_displacement = by_displacement
        self.sum: Tensor | None = None  # [h, M, K] of the tiles so far that are of these patterns
        self.patterns: Patterns | None = None

    def add(self, scores: Tensor, chunk: range, strip: int) -> None:
        """Adds the scores [N, M, K] of some tiles; 0 for what is no query."""
        for tiles, patterns in alike(scores, self.plan, chunk, strip):
            part = tiles.unflatten(0, (-1, len(self.total))).sum((0, 2))
            if self.sum is not None and patterns == self.patterns:
                self.sum += part
            else:
                self.flush()
                self.sum, self.patterns = part, patterns

    def flush(self) -> None:
        """Brings what was added into the total."""
        if self.sum is None:
            return
        plan, device = self.plan, self.sum.device
        pixels = by_pixel(self.sum, plan)  # [h, TW, folded, TH, K]
        keys = slot_keys(plan, self.patterns, device)[None, :, None].expand(*pixels.shape[:4], -1)
        slots = pixels.gather(-1, keys)
        if self.by_displacement:
            entries = slot_displacements(plan, self.patterns, device)[None, :, None].expand(keys.shape)
            slots = slots.new_zeros((*keys.shape[:4], self.total.shape[-1])).scatter_(-1, entries, slots)
        self.total[:, :, : slots.shape[-1]] += slots.sum((1, 3))
        self.sum = None


class Absent:
    """Keys that do not take part: out of the map where an axis has such a border, or masked."""

    def __init__(self, plan: Plan, masked: Tensor | None, like: Tensor, everywhere: bool = False):
        """masked: bool [b, h, 1, Hk, Wk, 1]. everywhere: no key out of the map takes part, whatever the border."""
        self.y, self.x = plan.y, plan.x
        self.above, self.beside = (everywhere or tiles.axis.outside_is_absent for tiles in (plan.y, plan.x))
        self.masked = None if masked is None else key_strip(plan, masked, like)

    def load(self, strip: int) -> None:
        if self.masked:
            self.masked.load(strip)

    def fill(self, scores: Tensor, chunk: range, strip: int, value: float) -> None:
        """Sets the scores [N, M, K] of such keys, for some tiles of the strip that is loaded."""
        if self.masked:
            scores.masked_fill_(self.masked.tiles(chunk).mT != 0.0, value)
        if not (self.above or self.beside):
            return
        height, width = self.y.length, self.x.length
        scores = scores.unflatten(0, (-1, len(chunk))).unflatten(-1, (width, height))  # [b*h, tiles, M, C, R]
        top, bottom = self.y.outside[strip] if self.above else (0, 0)
        if top or bottom:
            scores[..., :top] = value
            scores[..., height - bottom :] = value
        for tile, left, right in self.x.overhanging if self.beside else ():
            if tile in chunk:
                scores[:, tile - chunk.start, :, :left] = value
                scores[:, tile - chunk.start, :, width - right :] = value


class Logits:
    """Logits of tiles, in a buffer that is used again."""

    def __init__(self, scale: float, terms: Terms | None, absent: Absent, scores: Tensor):
        """scores: [N, M, K] of as many tiles as there are in a product."""
        self.scale = scale
        self.terms = terms
        self.absent = absent
        self.scores = scores

    def __call__(self, query: Tensor, key: Tensor, chunk: range, strip: int, absent: float) -> Tensor:
        """[N, M, K] of some tiles of the strip that is loaded; `absent` where a key does not take part."""
        scores = self.scores[: len(query)]
        multiply(query, key.mT, scores, self.scale)
        if self.terms:
            self.terms.add(scores, chunk, strip)
        self.absent.fill(scores, chunk, strip, absent)
        return scores
