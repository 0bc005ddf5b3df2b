"""Plans of the native kernels: tiles, warps and bands of halos, and what a block holds under one.

A warp's 16 or 32 pixels see few keys that count for none of them, so tiles need no other shape than what makes halos
cheap.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ..integers import cdiv

_PATTERN = 1024  # bytes after which a swizzle's pattern begins anew
_PART = 128  # bytes that are swizzled together at most
_BARRIERS = 32  # bytes of a slot
_VECTOR = 16  # bytes, of which copies are multiples
_BLOCK = 8  # columns of halves: a vector
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
    def axes(self) -> str:
        """Of a copy: channels, columns and rows, those side by side first; fragments of halves take rows of planes."""
        if not self.planes:
            return "cxy"
        return "xcy" if _in_blocks(self) else "xyc"

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
    it is one head. band: rows of the halo that are copied at once, 0 for all; slots: bands held at once. units: of 16
    pixels that a warp takes, one or two, which share what is read of a halo but hold twice as many registers.
    shared_by: warps that take turns at the bands that a subtile sees, in similarity alone. shifted: tiles over
    planes of halves begin so that a subtile sees fewer blocks of columns, if it does then; kept maps are then read, and
    results written, number by number.
    """

    tile: tuple[int, int]
    warps: int
    resident: int
    step: int
    pixel_bytes: int = _PART
    band: int = 0
    slots: int = 1
    units: int = 1
    shared_by: int = 1
    shifted: bool = False

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
    columns of a band from `skip` on. before: columns before the map where the first tile begins, for halos to need no
    pad; a kept map's tile is then copied with as many columns before it as it lies past a vector.
    """

    sub: tuple[int, int]
    seen: tuple[int, int]
    band: tuple[int, int]
    bands: int
    pad: int
    skip: int
    before: int

    @property
    def offset(self) -> int:
        """Columns from the last whole vector to a tile."""
        return -self.before % _BLOCK

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
    blocks, sub = _in_blocks(form), _subtile(task, plan, form)
    before = _before(kw, sub[1], lead) if plan.shifted and blocks and task not in UNFUSED else 0
    pad = (-lead - before) % form.vector if form.planes else 0
    skip = 0 if blocks else pad // 2 * 2  # pairs of columns are loaded at once
    seen_h, seen_w = kh + sub[0] - 1, pad - skip + kw + sub[1] - 1
    if form.planes:
        seen_w = cdiv(seen_w, _BLOCK if blocks else 2) * (_BLOCK if blocks else 2)
    rows, cols = plan.band or th + kh - 1, skip + tw - sub[1] + seen_w
    if form.planes:
        cols = cdiv(cols, form.vector) * form.vector
        if not blocks:
            rows, cols = _apart(rows, cols, not plan.band)
    return Shape(sub, (seen_h, seen_w), (rows, cols), cdiv(th + kh - 1, rows), pad, skip, before)


def _before(kernel: int, sub: int, lead: int) -> int:
    """Columns before the map where the first tile is to begin: if a subtile sees fewer blocks of columns then."""
    seen, pad = kernel + sub - 1, -lead % _BLOCK
    return pad if cdiv(seen, _BLOCK) < cdiv(pad + seen, _BLOCK) else 0


def _in_blocks(form: Form) -> bool:
    """Whether pixels are seen in blocks of 8 columns."""
    return form.planes and form.product == "half"


def unit(task: str, form: Form) -> tuple[int, int]:
    """Rows and columns of the 16 pixels of a matrix instruction.

    Keys side by side are in slots side by side of what a query has for them.
    """
    return (2, 8) if _in_blocks(form) or task == "aggregate_transpose" else (4, 4)


def _subtile(task: str, plan: Plan, form: Form) -> tuple[int, int]:
    """Of a warp: units one below the other where they are wide, else side by side."""
    h, w = unit(task, form)
    return (plan.units * h, w) if w > h else (h, plan.units * w)


def _apart(rows: int, cols: int, may_grow: bool) -> tuple[int, int]:
    """Of a band of planes of floats: as many or a few more, so that the channels of a fragment lie in different banks.

    may_grow: in its rows too. Bands of four rows find no such width: two channels share a bank.
    """
    choices = [(h, cols + 4 * more) for h in range(rows, rows + (4 if may_grow else 1)) for more in range(4)]
    apart = [(h, w) for h, w in choices if h * w % 16 == 8]
    return min(apart, key=lambda size: size[0] * size[1], default=(rows, cols))


def patterns(plan: Plan, held: Shape, channels: int, form: Form) -> tuple[int, int]:
    """Bytes of the patterns that copies of tiles and of bands are swizzled in; 16 is none."""
    if form.product != "half":
        return 16, 16 if form.planes else min(_PART, channels * form.element)
    if form.planes:
        return 16 if held.offset else _pattern(2 * plan.tile[1]), _pattern(2 * held.band[1])
    return 2 * channels, 2 * channels


def _pattern(row: int) -> int:
    """Of rows of so many bytes: as wide, or none. Copies whose rows are narrower than a pattern go wrong."""
    return row if row in (32, 64, 128) else 16


def box(pixels: tuple[int, int], channels: int, form: Form) -> tuple[int, ...]:
    """What a copy takes of each of its axes."""
    most = channels if form.planes else min(channels, _PART // form.element)
    takes = {"c": most, "x": pixels[1], "y": pixels[0]}
    return tuple(takes[axis] for axis in form.axes)


def suits(task: str, plan: Plan, group: int, form: Form) -> bool:
    """Whether warps share a block evenly, and, where bands pass, take one head of subtiles that begin with a band.

    Only where they pass may warps take turns at them.
    """
    (th, tw), (sub_h, sub_w) = plan.tile, _subtile(task, plan, form)
    subtiles = th // sub_h * (tw // sub_w) * plan.shared_by
    if plan.shared_by > 1 and not plan.band:
        return False
    if th % sub_h or tw % sub_w or (plan.band and (plan.warps != subtiles * group or sub_h % plan.band)):
        return False
    return plan.warps % subtiles == 0 and subtiles * group % plan.warps == 0


def shared(task: str, plan: Plan, group: int, depth: int, kernel: tuple[int, int], held: Shape, form: Form) -> int:
    """Bytes of shared memory that a block takes. kernel: of the window."""
    rows, cols = held.band
    pixel = group * depth * form.element
    parts = 1 if form.planes else cdiv(pixel, _PART)
    band = parts * _whole_patterns(rows * cols * pixel // parts)
    tile = _whole_patterns(plan.tile[0] * kept_columns(plan, held) * pixel) if form.product == "half" else 0
    queries = held.bands * rows * cols * group * _query_bytes(form) if task == "grad_key_value" else 0
    weights = 0
    if task in ("similarity", "aggregate"):
        weights = plan.tile[0] * plan.tile[1] * group * kernel[0] * kernel[1] * form.element
    bands = plan.slots * (halo_maps(task) * band + _BARRIERS)
    return bands + _TILES.get(task, 1) * tile + queries + weights


def kept_columns(plan: Plan, held: Shape) -> int:
    """Of a kept map's tile, as it is copied."""
    return plan.tile[1] + (_BLOCK if held.offset else 0)


def _query_bytes(form: Form) -> int:
    """Of log-sum-exp and delta of a query that is seen."""
    return 12 if form.product == "half" else 8


def _whole_patterns(count: int) -> int:
    return cdiv(count, _PATTERN) * _PATTERN
