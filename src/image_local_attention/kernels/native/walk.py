"""Kernels whose blocks walk down a map, of the products of 64 rows that sm_90 has: what they hold, and their launch."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..integers import cdiv
from . import driver
from .compiled import ARGUMENTS, lead_of, options_of, text
from .products import products

_GROUP_THREADS = 128
_MOST_GROUPS = 8  # of a block, that which copies among them
_TILE = 64  # pixels
_BARRIERS = 16  # bytes of a place
_PATTERN = 1024
_PART = 64  # channels that are copied together where they lie side by side
DEPTHS = 16, 32, 64, 128  # channels that kernels have room for
VECTOR = 8  # columns, of which copies of planes begin on multiples
# Columns of bands of planes, whose rows are those of a pattern. Others and single tiles have the first at most.
_WIDTHS = 32, 64
_STEP = 16  # columns that products take at once
# Bands of a set beside which to begin a block costs little. Where blocks have a set each, those that run at once lie
# side by side, and what they see stays in the L2 cache.
_MANY = 100
_BETWEEN = 64  # bytes, for what is moved at once to lie in different banks


@dataclass(frozen=True)
class WalkPlan:
    """Blocks of `groups` of four warps, each of which has a tile, and of one more, which copies.

    tile: kept pixels (rows, columns), 8x8 or 4x16. band: rows of the halo that are copied at once. slots: bands that
    are held at once. abreast: groups whose tiles lie side by side; such rows of tiles are taken in turns. one_by_one:
    whether kept maps are copied and moved one after the other, which takes less room. Only maps whose columns lie side
    by side have tiles of 4x16, more than one abreast, and theirs one by one. chunk: columns of the halo that are copied
    at once; then no bands are held for the tiles below, so that windows may be of any size. 0: all columns.
    """

    tile: tuple[int, int] = (8, 8)
    band: int = 4
    slots: int = 6
    groups: int = 2
    abreast: int = 1
    one_by_one: bool = False
    chunk: int = 0

    @property
    def turns(self) -> int:
        """Rows of tiles that a block has at once, one below the other."""
        return self.groups // self.abreast

    @property
    def columns(self) -> int:
        """Of tiles side by side."""
        return self.tile[1] * self.abreast


class Walk(NamedTuple):
    """What a kernel is compiled for, and how it is launched; `kernel` and `lead` are of both axes.

    depth: channels of a head. multiprocessors: of the GPU, which blocks are to share evenly.
    """

    task: str
    plan: WalkPlan
    planes: bool
    dtype: torch.dtype
    depth: int
    kernel: tuple[int, int]
    lead: tuple[int, int]
    multiprocessors: int

    @property
    def room(self) -> int:
        """For channels: what a head has no channels for is zero."""
        return room_for(self.depth)

    @property
    def seen_lead(self) -> tuple[int, int]:
        """From the first pixel that a kept one sees to it."""
        return tuple(lead_of(self.task, k, lead) for k, lead in zip(self.kernel, self.lead, strict=True))

    @property
    def halo(self) -> tuple[int, int]:
        """Rows and columns of a band."""
        seen = self.pad + self.plan.columns + self.kernel[1] - 1
        if self.plan.chunk:
            return self.plan.band, self.plan.chunk
        if self.planes:
            return self.plan.band, next((width for width in _WIDTHS if seen <= width), seen)
        return self.plan.band, cdiv(seen, self._multiple) * self._multiple

    @property
    def _multiple(self) -> int:
        """Of columns that halos have where channels lie side by side."""
        # Two rows of four columns more fill blocks of 8, and four such rows an even number of them.
        by_two_rows = self.task == "grad_key_value" and self.plan.band % 4 == 0
        return VECTOR // 2 if by_two_rows else VECTOR

    @property
    def chunks(self) -> int:
        """Into which the columns of a halo are cut."""
        return cdiv(self.pad + self.plan.columns + self.kernel[1] - 1, self.plan.chunk) if self.plan.chunk else 1

    @property
    def set_bands(self) -> int:
        """Of all chunks, of tiles one below the other that a block has at once."""
        last = self.plan.tile[0] * self.plan.turns + self.kernel[0] - 1
        return cdiv(last, self.plan.band) * self.chunks

    @property
    def seen(self) -> int:
        """Columns of a band that products of a tile take."""
        if not self.planes or self.chunks > 1:
            return self.halo[1]
        return cdiv(self.pad + self.plan.tile[1] + self.kernel[1] - 1, _STEP) * _STEP

    @property
    def before(self) -> int:
        """Columns before the map where the first of tiles 8 wide begins, for halos to begin on whole vectors."""
        return -self.seen_lead[1] % VECTOR if self.planes and self.plan.tile[1] == VECTOR else 0

    @property
    def pad(self) -> int:
        """Columns of a halo before those that are seen, for it to begin on whole vectors where tiles do."""
        return -self.seen_lead[1] % VECTOR if self.planes and self.plan.tile[1] > VECTOR else 0

    @property
    def fits(self) -> bool:
        """Whether a halo is as wide as a copy can be, bands come while others are held, and groups share a block.

        Products of a tile see nothing but its band, and take 16 pixels at once: where channels lie side by side, of two
        rows.
        """
        (th, tw), (kh, _), plan = self.plan.tile, self.kernel, self.plan
        held = plan.chunk or cdiv(th + kh - 1, plan.band) <= plan.slots + th // plan.band * plan.turns
        comes = plan.slots > 1 and held
        even = th % plan.band == 0 and 1 < plan.groups < _MOST_GROUPS and plan.groups % plan.abreast == 0
        widest = _WIDTHS[plan.abreast > 1 or plan.chunk > 0]
        seen = tw * (plan.abreast - 1) + self.seen <= self.halo[1] <= widest
        if self.planes:
            return comes and even and seen and plan.chunk in (0, *_WIDTHS)
        single = plan.abreast == 1 and tw == VECTOR and not plan.one_by_one
        rows = plan.band % 2 == 0 and self.halo[1] % self._multiple == 0 and self.depth % _PART == 0
        return comes and even and seen and single and rows

    @property
    def name(self) -> str:
        return f"walk_{self.task}"

    @property
    def options(self) -> tuple[str, ...]:
        """Of NVRTC, but for the architecture."""
        names = {
            "BF16": int(self.dtype == torch.bfloat16),
            "PLANES": int(self.planes),
            "DEPTH": self.room,
            "CHANNELS": self.depth,
            "KEPT_MAPS": self.kept_maps,
            "STAGED": self.staged,
            "PRODUCT_MAPS": self.product_maps,
            "NUMBERS": self.numbers,
            "BEFORE": self.before,
            "PAD": self.pad,
            "BAND_H": self.halo[0],
            "HALO_W": self.halo[1],
            "SEEN_W": self.seen,
            "SLOTS": self.plan.slots,
            "APART": int(self.plan.chunk > 0),
            "CHUNKS": self.chunks,
            "GROUPS": self.plan.groups,
            "ABREAST": self.plan.abreast,
        }
        sizes = {"KERNEL": self.kernel, "TILE": self.plan.tile}
        names |= {f"{name}_{axis}": size for name, both in sizes.items() for axis, size in zip("HW", both, strict=True)}
        names |= {"SEEN_LEAD_Y": self.seen_lead[0], "SEEN_LEAD_X": self.seen_lead[1]}
        return options_of(names)

    @property
    def source(self) -> str:
        return self.machine + self.program

    @property
    def machine(self) -> str:
        """Source of what only a GPU can do."""
        pixels = self.seen * (self.plan.band if self.seen == self.halo[1] else 1)
        number = "bf16" if self.dtype == torch.bfloat16 else "f16"
        return text("instructions.cuh") + text("hopper.cuh") + products(pixels, self.together, self.planes, number)

    @property
    def program(self) -> str:
        """The rest."""
        maps = "walk_planes.cuh" if self.planes else "walk_rows.cuh"
        files = "basics.cuh", "walk.cuh", "walk_seen.cuh", maps, "walk_copies.cuh", f"{self.name}.cu"
        return "".join(map(text, files))

    @property
    def features(self) -> str:
        """Of the architecture, as its name has them."""
        return "a"

    @property
    def threads(self) -> int:
        return (self.plan.groups + 1) * _GROUP_THREADS

    @property
    def early(self) -> bool:
        """Little goes through the L1 cache."""
        return True

    @property
    def together(self) -> int:
        """Channels of a copy, and of the products of weights."""
        return self.room if self.planes else _PART

    @property
    def kept_maps(self) -> int:
        """Whose tiles are copied."""
        return sum(ARGUMENTS[self.task].of_maps(1, 0, 0))

    @property
    def product_maps(self) -> int:
        """Of these, those that products take."""
        return min(self.kept_maps, 2)

    @property
    def staged(self) -> int:
        """Of these, those whose tiles are there at once."""
        return 1 if self.plan.one_by_one else self.kept_maps

    @property
    def numbers(self) -> int:
        """Floats of a pixel of a band: log-sum-exp and delta."""
        return 2 if self.task == "grad_key_value" else 0

    @property
    def kept_box(self) -> tuple[int, int]:
        """Rows and columns of what is copied of a kept map: of tiles, with the vectors that they begin and end in."""
        return self.plan.tile[0], self.plan.columns + (VECTOR if self.before else 0)

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a block takes."""
        rows, columns = self.halo
        band = 2 * rows * columns * self.room * 2 + _whole_patterns(rows * columns * self.numbers * 4)
        kept = self.staged * _whole_patterns(self.kept_box[0] * self.kept_box[1] * self.room * 2)
        apart = 7 * _BETWEEN if self.plan.tile[1] > VECTOR else 0  # of the 8 pixels that come one after the other
        moved = self.product_maps * (_TILE * self.room * 2 + apart)  # to where products take tiles from
        held = kept + self.plan.groups * moved if self.planes else self.plan.groups * kept
        return self.plan.slots * (band + _BARRIERS) + held + self.plan.turns * self.kept_maps // self.staged * _BARRIERS

    @property
    def described(self) -> tuple[Callable[[Tensor], bytes], ...]:
        """How the kernel's arguments describe each map."""
        pattern = 2 * (self.halo[1] if self.planes else _PART)
        halo = functools.partial(driver.tensor_map, self.axes, self._box(self.halo), pattern)
        tile = functools.partial(driver.tensor_map, self.axes, self._box(self.kept_box), 16 if self.planes else pattern)
        return ARGUMENTS[self.task].of_maps(tile, halo, driver.strided_map)

    @property
    def axes(self) -> str:
        """Of a copy; heads are apart where it is to end with a head's channels."""
        if self.depth < self.room:
            return "xcyh"
        return "xcy" if self.planes else "cxy"

    def _box(self, pixels: tuple[int, int]) -> tuple[int, ...]:
        takes = {"c": self.together, "x": pixels[1], "y": pixels[0], "h": 1}
        return tuple(takes[axis] for axis in self.axes)

    def grid(self, batch: int, heads: int, h: int, w: int) -> tuple[int, int, int]:
        unit = self.plan.tile[0] * (self.plan.turns if self.plan.chunk else 1)
        rows, columns = cdiv(h, unit), heads * cdiv(w + self.before, self.plan.columns)
        alone = self.plan.chunk and self.set_bands >= _MANY
        return columns, rows if alone else parts(rows, columns * batch, self.multiprocessors), batch


def _whole_patterns(count: int) -> int:
    return cdiv(count, _PATTERN) * _PATTERN


def room_for(depth: int) -> int | None:
    """The least number of channels that a kernel has room for, and a head fits into."""
    return next((room for room in DEPTHS if depth <= room), None)


@functools.lru_cache(maxsize=1024)
def parts(rows: int, columns: int, multiprocessors: int) -> int:
    """Into how many blocks columns of so many tiles are cut, for the last to end soon.

    Each multiprocessor takes one block after the other; to begin one costs about as much as a tile. Of
    counts that take as long the first is the least, so that no block is empty.
    """

    def time(count: int) -> int:
        return cdiv(columns * count, multiprocessors) * (cdiv(rows, count) + 1)

    return min(range(1, min(rows, multiprocessors) + 1), key=time)
