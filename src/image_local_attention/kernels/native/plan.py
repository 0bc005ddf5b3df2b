"""Plans of the native kernels: tiles, warps and bands of halos, and what a block holds under one.

A warp's 16 pixels see few keys that count for none of them, so tiles need no other shape than what makes halos cheap.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ..integers import cdiv

_PATTERN = 1024  # bytes after which a swizzle's pattern begins anew
_PART = 128  # bytes that are swizzled together at most
_BARRIERS = 32  # bytes of a slot
_VECTOR = 16  # bytes, of which copies are multiples
_TILES = {"grad_query": 3, "grad_key_value": 2}  # that halves keep in shared memory, else one
UNFUSED = "similarity", "aggregate", "aggregate_transpose"  # tasks over weights, which stream one map


class Form(NamedTuple):
    """Of a kernel's maps. product: "half", "tf32" or "three-pass". planes: columns lie side by side, else channels."""

    product: str
    planes: bool

    @property
    def element(self) -> int:
        """Bytes of a number."""
        return 2 if self.product == "half" else 4

    @property
    def vector(self) -> int:
        """Columns that a copy of planes begins on a multiple of."""
        return _VECTOR // self.element


@dataclass(frozen=True)
class Plan:
    """`tile` kept pixels (rows, columns), `warps` of a block.

    resident: blocks that are to share a multiprocessor, which bounds the registers of a thread. step: pairs of blocks
    of 8 pixels that are unrolled at most; in the forward, those of a chunk, after which the maximum is looked at; in
    aggregate_transpose, those whose weights are under way.
    pixel_bytes: of a pixel's heads that share a block, at most; one head may be deeper. Where columns lie side by side,
    it is one head. band: rows of the halo that are copied at once, 0 for all; slots: bands held at once. shared_by:
    warps that take turns at the pairs of blocks of a subtile and head, in similarity alone.
    """

    tile: tuple[int, int]
    warps: int
    resident: int
    step: int
    pixel_bytes: int = _PART
    band: int = 0
    slots: int = 1
    shared_by: int = 1

    def group(self, heads: int, depth: int, form: Form) -> int:
        """Heads of a block."""
        if form.planes:
            return 1
        fits = (group for group in (4, 2) if heads % group == 0 and group * depth * form.element <= self.pixel_bytes)
        return next(fits, 1)


class Shape(NamedTuple):
    """Of what a block holds under a plan, in pixels (rows, columns).

    sub: of a warp's subtile. seen: what a subtile sees. band: what is copied at once, one of `bands`, with columns that
    are copied for the sake of addresses: `pad` before those that are seen, and more behind them. Subtiles see all
    columns of a band from `skip` on.
    """

    sub: tuple[int, int]
    seen: tuple[int, int]
    band: tuple[int, int]
    bands: int
    pad: int
    skip: int

    @property
    def pairs(self) -> int:
        """Pairs of blocks of 8 pixels that a subtile sees of a band."""
        rows = self.seen[0] if self.bands == 1 else self.band[0]
        return cdiv(rows * self.seen[1], 16)


def halo_maps(task: str) -> int:
    """Maps that are streamed."""
    return 1 if task in UNFUSED else 2


def shape(task: str, plan: Plan, kernel: tuple[int, int], lead: int, form: Form) -> Shape:
    """lead: columns from the first that a pixel sees to its own."""
    (th, tw), (kh, kw) = plan.tile, kernel
    blocks = form.planes and form.product == "half"  # planes of halves are seen in blocks of 8 columns
    # keys side by side are in slots side by side of what a query has for them
    sub = (2, 8) if blocks or task == "aggregate_transpose" else (4, 4)
    pad = -lead % form.vector if form.planes else 0
    skip = 0 if blocks else pad // 2 * 2  # pairs of columns are loaded at once
    seen_h, seen_w = kh + sub[0] - 1, pad - skip + kw + sub[1] - 1
    if form.planes:
        seen_w = cdiv(seen_w, 8 if blocks else 2) * (8 if blocks else 2)
    rows, cols = plan.band or th + kh - 1, skip + tw - sub[1] + seen_w
    if form.planes:
        rows, cols = _apart(rows, cols, not plan.band, form)
    return Shape(sub, (seen_h, seen_w), (rows, cols), cdiv(th + kh - 1, rows), pad, skip)


def _apart(rows: int, cols: int, may_grow: bool, form: Form) -> tuple[int, int]:
    """Of a band of planes: as many or a few more, so that the channels of a fragment lie in different banks.

    may_grow: in its rows too. Floats in bands of four rows find no such width: two channels share a bank.
    """
    vector = form.vector
    least = cdiv(cols, vector) * vector
    if form.product == "half":
        return rows + (may_grow and rows % 2 == 0), least
    choices = [(h, least + vector * more) for h in range(rows, rows + (4 if may_grow else 1)) for more in range(4)]
    apart = [(h, w) for h, w in choices if h * w % 16 == 8]
    return min(apart, key=lambda size: size[0] * size[1], default=(rows, least))


def patterns(plan: Plan, held: Shape, channels: int, form: Form) -> tuple[int, int]:
    """Bytes of the patterns that copies of tiles and of bands are swizzled in: of a copy's rows; 16 is none.

    In planes of halves, a band is swizzled where its rows would put every other channel in the same banks.
    """
    if form.product != "half":
        return 16, 16 if form.planes else min(_PART, channels * form.element)
    if form.planes:
        return 2 * plan.tile[1], 64 if held.band[1] == 32 else 16
    return 2 * channels, 2 * channels


def box(pixels: tuple[int, int], channels: int, form: Form) -> tuple[int, int, int]:
    """What a copy takes of a map's first three axes: columns, rows and channels, or channels, columns and rows."""
    rows, cols = pixels
    return (cols, rows, channels) if form.planes else (min(channels, _PART // form.element), cols, rows)


def suits(plan: Plan, group: int, form: Form) -> bool:
    """Whether warps share a block's subtiles and heads evenly; one head each where bands pass."""
    subtiles = plan.tile[0] * plan.tile[1] // 16 * plan.shared_by
    if plan.band and plan.warps != subtiles * group:
        return False
    return plan.warps % subtiles == 0 and subtiles * group % plan.warps == 0


def shared(task: str, plan: Plan, group: int, depth: int, kernel: tuple[int, int], held: Shape, form: Form) -> int:
    """Bytes of shared memory that a block takes. kernel: of the window."""
    rows, cols = held.band
    pixel = group * depth * form.element
    parts = 1 if form.planes else cdiv(pixel, _PART)
    band = parts * _whole_patterns(rows * cols * pixel // parts)
    tile = _whole_patterns(plan.tile[0] * plan.tile[1] * pixel) if form.product == "half" else 0
    queries = held.bands * rows * cols * group * 8 if task == "grad_key_value" else 0
    weights = 0
    if task in ("similarity", "aggregate"):
        weights = plan.tile[0] * plan.tile[1] * group * kernel[0] * kernel[1] * form.element
    bands = plan.slots * (halo_maps(task) * band + _BARRIERS)
    return bands + _TILES.get(task, 1) * tile + queries + weights


def _whole_patterns(count: int) -> int:
    return cdiv(count, _PATTERN) * _PATTERN
