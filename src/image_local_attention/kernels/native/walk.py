"""Kernels whose blocks walk down a map, of the products of 64 rows that sm_90 has: what they serve and hold."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..integers import cdiv
from . import driver
from .compiled import ARGUMENTS, lead_of, options_of, text
from .plan import Form
from .products import products

_ARCH = 90  # no other GPU has these products
_DEPTHS = {True: (16, 32, 64, 128), False: (64,)}  # channels of a head, by whether columns lie side by side
_GROUP_THREADS = 128
_MOST_GROUPS = 8  # of a block, that which copies among them
_TILE = 64  # pixels
_BARRIERS = 16  # bytes of a place
_PATTERN = 1024
_VECTOR = 8  # columns, of which copies of planes begin on multiples
# Columns of bands of planes, whose rows are those of a pattern. Others and single tiles have the first at most.
_WIDTHS = 32, 64
_STEP = 16  # columns that products take at once
_APART = 64  # bytes, for what is moved at once to lie in different banks


@dataclass(frozen=True)
class WalkPlan:
    """Blocks of `groups` of four warps, each of which has a tile, and of one more, which copies.

    tile: kept pixels (rows, columns), 8x8 or 4x16. band: rows of the halo that are copied at once. slots: bands that
    are held at once. abreast: groups whose tiles lie side by side; such rows of tiles are taken in turns. one_by_one:
    whether kept maps are copied and moved one after the other, which takes less room. Both are of planes alone.
    """

    tile: tuple[int, int] = (8, 8)
    band: int = 4
    slots: int = 6
    groups: int = 2
    abreast: int = 1
    one_by_one: bool = False

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
    def seen_lead(self) -> tuple[int, int]:
        """From the first pixel that a kept one sees to it."""
        return tuple(lead_of(self.task, k, lead) for k, lead in zip(self.kernel, self.lead, strict=True))

    @property
    def halo(self) -> tuple[int, int]:
        """Rows and columns of a band."""
        seen = self.pad + self.plan.columns + self.kernel[1] - 1
        wide = next((width for width in _WIDTHS if seen <= width), seen)
        return self.plan.band, wide if self.planes else cdiv(seen, 4) * 4

    @property
    def seen(self) -> int:
        """Columns of a band that products of a tile take."""
        if self.plan.abreast == 1:
            return self.halo[1]
        return cdiv(self.pad + self.plan.tile[1] + self.kernel[1] - 1, _STEP) * _STEP

    @property
    def before(self) -> int:
        """Columns before the map where the first of tiles 8 wide begins, for halos to begin on whole vectors."""
        return -self.seen_lead[1] % _VECTOR if self.planes and self.plan.tile[1] == _VECTOR else 0

    @property
    def pad(self) -> int:
        """Columns of a halo before those that are seen, for it to begin on whole vectors where tiles do."""
        return -self.seen_lead[1] % _VECTOR if self.planes and self.plan.tile[1] > _VECTOR else 0

    @property
    def fits(self) -> bool:
        """Whether a halo is as wide as a copy can be, bands come while others are held, and groups share a block.

        Products of a tile see nothing but its band. Where channels lie side by side, two rows of a band are taken
        together.
        """
        (th, tw), (kh, _), plan = self.plan.tile, self.kernel, self.plan
        comes = plan.slots > 1 and cdiv(th + kh - 1, plan.band) <= plan.slots + th // plan.band * plan.turns
        even = th % plan.band == 0 and 1 < plan.groups < _MOST_GROUPS and plan.groups % plan.abreast == 0
        seen = tw * (plan.abreast - 1) + self.seen <= self.halo[1] <= _WIDTHS[0 if plan.abreast == 1 else 1]
        able = self.planes or (plan.band % 2 == 0 and plan.abreast == 1 and not plan.one_by_one)
        return comes and even and seen and able

    @property
    def name(self) -> str:
        return f"walk_{self.task}"

    @property
    def options(self) -> tuple[str, ...]:
        """Of NVRTC, but for the architecture."""
        names = {
            "BF16": int(self.dtype == torch.bfloat16),
            "PLANES": int(self.planes),
            "DEPTH": self.depth,
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
        pixels = self.seen * (self.plan.band if self.plan.abreast == 1 else 1)
        number = "bf16" if self.dtype == torch.bfloat16 else "f16"
        return text("instructions.cuh") + text("hopper.cuh") + products(pixels, self.depth, self.planes, number)

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
        return self.plan.tile[0], self.plan.columns + (_VECTOR if self.before else 0)

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a block takes."""
        rows, columns = self.halo
        band = 2 * rows * columns * self.depth * 2 + _whole_patterns(rows * columns * self.numbers * 4)
        kept = self.staged * _whole_patterns(self.kept_box[0] * self.kept_box[1] * self.depth * 2)
        apart = 7 * _APART if self.plan.tile[1] > _VECTOR else 0  # of the 8 pixels that come one after the other
        moved = self.product_maps * (_TILE * self.depth * 2 + apart)  # to where products take tiles from
        held = kept + self.plan.groups * moved if self.planes else self.plan.groups * kept
        return self.plan.slots * (band + _BARRIERS) + held + self.plan.turns * self.kept_maps // self.staged * _BARRIERS

    @property
    def described(self) -> tuple[Callable[[Tensor], bytes], ...]:
        """How the kernel's arguments describe each map."""
        pattern = 2 * (self.halo[1] if self.planes else self.depth)
        halo = functools.partial(driver.tensor_map, self.axes, self._box(self.halo), pattern)
        tile = functools.partial(driver.tensor_map, self.axes, self._box(self.kept_box), 16 if self.planes else pattern)
        return ARGUMENTS[self.task].of_maps(tile, halo, driver.strided_map)

    @property
    def axes(self) -> str:
        """Of a copy."""
        return "xcy" if self.planes else "cxy"

    def _box(self, pixels: tuple[int, int]) -> tuple[int, ...]:
        takes = {"c": self.depth, "x": pixels[1], "y": pixels[0]}
        return tuple(takes[axis] for axis in self.axes)

    def grid(self, batch: int, heads: int, h: int, w: int) -> tuple[int, int, int]:
        rows, columns = cdiv(h, self.plan.tile[0]), heads * cdiv(w + self.before, self.plan.columns)
        return columns, parts(rows, columns * batch, self.multiprocessors), batch


class Row(NamedTuple):
    least: int  # the smaller side of the smallest window
    kernel: int  # the larger side of the widest
    plan: WalkPlan
    pixels: int = 1 << 60  # of all images and heads, at most
    plane: int = 0  # pixels of one image, at least


# Pixels of an image whose planes are larger than some 2 MiB. At 64 channels and more, rows of copies take up to half as
# long again then, so that plans with fewer of them are faster: tiles side by side share theirs.
_LARGE = 3 << 19

# The first row whose window and sizes match is taken. Figures are milliseconds on an H200, of gradients of key and
# value with delta, by task, whether columns lie side by side and channels per head; then those of the kernel that
# `table` has for these windows or, behind "of", of the row that would be taken else. 512-64-k7 is one map of 512x512
# pixels and 64 channels, 8x128-8x64-k7 eight of 128x128 and 8 heads.
_TABLE = {
    ("forward", True, 16): (
        Row(11, 17, WalkPlan((4, 16), 4, 12, 3)),  # 512-4x16-k13 0.198 : 0.220
        Row(15, 21, WalkPlan((4, 16), 2, 12, 4, 2)),  # 512-4x16-k21 0.394 : 0.418
    ),
    ("forward", True, 32): (
        Row(9, 9, WalkPlan((4, 16), 4, 4, 3, 3), plane=_LARGE),  # 2048-32-k9 0.692, of 0.877
        Row(9, 17, WalkPlan((4, 16), 2, 12, 4)),  # 512-4x32-k9 0.188 : 0.220, k13 0.225 : 0.296
        Row(15, 21, WalkPlan((8, 8), 2, 12, 4)),  # 512-2x32-k21 0.231 : 0.375
    ),
    ("forward", True, 64): (
        # 4x64-2x64-k7 0.0144 : 0.0186, 64-64-k7 0.0098 : 0.0143, 128-64-k5 0.0117 : 0.0167, k11 0.0139 : 0.0204
        Row(3, 11, WalkPlan((4, 16), 2, 3, 4, 2), pixels=2**15),
        Row(3, 5, WalkPlan((4, 16), 2, 5, 4, 2), pixels=2**19),  # 512-64-k3 0.059 : 0.073, k5 0.057 : 0.085
        Row(3, 5, WalkPlan((4, 16), 2, 5, 3, 3)),  # 2048-64-k5 0.873 : 1.229
        Row(3, 9, WalkPlan((4, 16), 2, 5, 3, 3), plane=_LARGE),  # 2048-64-k7 0.906, of 1.06, k9 1.04, of 1.07
        # 8x128-8x64-k7 0.230 : 0.344, k9 0.255 : 0.378, k11 0.281 : 0.461
        Row(3, 11, WalkPlan((4, 16), 2, 5, 4, 2)),
        Row(5, 13, WalkPlan((4, 16), 2, 5, 4, 2), plane=_LARGE),  # 2048-64-k13 1.36, of 1.76
        Row(5, 17, WalkPlan((4, 16), 4, 4, 3)),  # 8x128-8x64-k13 0.312 : 0.461; 512-64-k17 0.095 : 0.159
        Row(15, 21, WalkPlan((8, 8), 2, 9, 4), plane=_LARGE),  # 2048-64-k21 3.69, of 4.23
        Row(15, 21, WalkPlan((8, 8), 4, 5, 3)),  # 512-64-k21 0.165 : 0.216; 128-64-k21 0.0241 : 0.0300
    ),
    ("forward", True, 128): (
        Row(3, 7, WalkPlan((4, 16), 1, 4, 4, 2)),  # 8x128-8x128-k5 0.435 : 0.679, k7 0.546 : 0.747
        Row(5, 9, WalkPlan((4, 16), 1, 4, 4, 2), plane=_LARGE),  # 2048-128-k9 2.66, of 3.51
        # 8x128-8x128-k9 0.611 : 0.817, k13 0.614 : 0.978; 256-4x128-k17 0.189 : 0.291
        Row(5, 17, WalkPlan((4, 16), 2, 5, 3)),
        Row(15, 21, WalkPlan((8, 8), 2, 4, 3)),  # 256-4x128-k21 0.334 : 0.580
    ),
    ("grad_query", True, 32): (
        Row(7, 9, WalkPlan((4, 16), 1, 12, 6, 3)),  # 2048-32-k7 0.808 : 0.853; 512-4x32-k9 0.248 : 0.252
        Row(9, 13, WalkPlan((4, 16), 1, 12, 6, 2), plane=_LARGE),  # 2048-32-k13 1.18, of 1.38
        Row(9, 17, WalkPlan((4, 16), 2, 12, 3)),  # 512-4x32-k13 0.301 : 0.375
        Row(15, 21, WalkPlan((8, 8), 2, 12, 3)),  # 512-2x32-k21 0.276 : 0.373
    ),
    ("grad_query", True, 64): (
        Row(3, 9, WalkPlan((4, 16), 2, 5, 3), pixels=2**15),  # 4x64-2x64-k7 0.0204 : 0.0204; 64-64-k7 0.0098 : 0.0160
        Row(3, 5, WalkPlan((4, 16), 1, 6, 3, 3)),  # 512-64-k3 0.081 : 0.096, 2048-64-k5 1.33 : 1.49
        Row(3, 7, WalkPlan((4, 16), 1, 6, 3, 3), plane=2**20),  # 1024-64-k7 0.358, of 0.365; 2048-64-k7 1.42, of 1.61
        Row(3, 7, WalkPlan((4, 16), 1, 6, 4, 2)),  # 8x128-8x64-k7 0.341, of 0.388
        Row(5, 11, WalkPlan((4, 16), 1, 6, 4, 2), plane=_LARGE),  # 2048-64-k9 1.72, of 2.63, k11 1.90, of 2.62
        # 8x128-8x64-k9 0.406 : 0.474, k11 0.453 : 0.566, k13 0.450 : 0.564; 128-64-k11 0.0175 : 0.0230;
        # 512-64-k17 0.129 : 0.181
        Row(5, 17, WalkPlan((4, 16), 2, 7, 3)),
        Row(15, 21, WalkPlan((8, 8), 2, 8, 3)),  # 512-64-k21 0.196 : 0.273; 128-64-k21 0.0284 : 0.0313
    ),
    ("grad_query", True, 128): (
        Row(3, 7, WalkPlan((4, 16), 1, 7, 2)),  # 8x128-8x128-k5 0.794 : 1.04, k7 0.782 : 1.11
        Row(5, 14, WalkPlan((4, 16), 1, 5, 3)),  # 8x128-8x128-k9 0.836 : 1.20, k13 0.988 : 1.34
        Row(15, 21, WalkPlan((8, 8), 1, 6, 3, one_by_one=True)),  # 256-4x128-k21 0.558 : 0.647
    ),
    ("grad_key_value", True, 32): (
        Row(5, 7, WalkPlan((4, 16), 1, 12, 4, 2)),  # 2048-32-k7 1.27 : 1.31; 512-2x32-k5 0.150 : 0.153
        Row(7, 9, WalkPlan((4, 16), 2, 8, 3, 3), plane=_LARGE),  # 2048-32-k9 1.40, of 1.54
        Row(7, 17, WalkPlan((4, 16), 2, 12, 3)),  # 512-4x32-k9 0.347 : 0.407, k13 0.423 : 0.433
        Row(15, 21, WalkPlan((8, 8), 2, 12, 3)),  # 512-2x32-k21 0.408 : 0.785
    ),
    ("grad_key_value", True, 64): (
        Row(3, 9, WalkPlan((4, 16), 2, 5, 2), pixels=2**15),  # 4x64-2x64-k7 0.0267 : 0.0308
        Row(3, 5, WalkPlan((4, 16), 1, 5, 3, 3)),  # 512-64-k3 0.114 : 0.124, 2048-64-k5 1.82 : 1.93
        Row(3, 7, WalkPlan((4, 16), 1, 7, 3, 3), plane=_LARGE),  # 2048-64-k7 2.02, of 2.96
        Row(5, 9, WalkPlan((4, 16), 2, 4, 2, 2), plane=_LARGE),  # 2048-64-k9 2.47, of 2.96
        # 8x128-8x64-k7 0.520 : 0.621, k9 0.568 : 0.700, k11 0.621 : 0.853, k13 0.671 : 0.855; 64-64-k7 0.0141 : 0.0201,
        # 128-64-k11 0.0221 : 0.0350; 512-64-k17 0.210 : 0.271
        Row(5, 17, WalkPlan((4, 16), 2, 8, 2)),
        Row(17, 21, WalkPlan((8, 8), 1, 12, 3), plane=2**20),  # 1024-64-k21 1.43, of 1.73, 2048-64-k21 6.54, of 8.60
        # 512-64-k19 0.304 : 0.378, k21 0.312 : 0.399, 8x128-8x64-k21 1.30 : 1.59
        Row(17, 21, WalkPlan((8, 8), 2, 9, 2)),
    ),
    ("grad_key_value", True, 128): (
        # 8x128-8x128-k5 0.979 : 1.55, k7 0.994 : 1.69, k9 1.08 : 1.87, k13 1.41 : 2.20
        Row(3, 13, WalkPlan((4, 16), 1, 8, 2, one_by_one=True)),
    ),
    ("grad_key_value", False, 64): (
        # 512-64-k9 0.119 : 0.118, k11 0.135 : 0.158, k13 0.140 : 0.156, k15 0.173 : 0.230, k17 0.178 : 0.220,
        # k19 0.209 : 0.296, k21 0.214 : 0.267; 8x128-8x64-k13 0.537 : 0.568, k21 0.820 : 1.014;
        # 128-64-k21 0.0228 : 0.0252
        Row(11, 21, WalkPlan()),
    ),
}


def table() -> Iterator[tuple[tuple[str, bool, int], tuple[Row, ...]]]:
    """Every task, whether columns lie side by side and channels per head, with their rows."""
    yield from _TABLE.items()


def serves(task: str, form: Form, depth: int, width: int, arch: int) -> bool:
    """Whether such a kernel can take a task over maps of a form, of so many channels per head and columns."""
    takes = (task, form.planes) in {of[:2] for of in _TABLE} and depth in _DEPTHS[form.planes]
    vectors = not form.planes or width % _VECTOR == 0
    return takes and vectors and form.product == "half" and arch == _ARCH


def choose(task: str, planes: bool, depth: int, pixels: int, plane: int, kernel: tuple[int, int]) -> WalkPlan | None:
    """The plan of a task that can be taken; None where blocks are not to walk.

    pixels: of all images and heads. plane: pixels of one image.
    """
    rows = (row for row in _TABLE.get((task, planes, depth), ()) if pixels <= row.pixels and plane >= row.plane)
    return next((row.plan for row in rows if min(kernel) >= row.least and max(kernel) <= row.kernel), None)


def _whole_patterns(count: int) -> int:
    return cdiv(count, _PATTERN) * _PATTERN


@functools.lru_cache(maxsize=1024)
def parts(rows: int, columns: int, multiprocessors: int) -> int:
    """Into how many blocks columns of so many tiles are cut, for the last to end soon.

    Each multiprocessor takes one block after the other; to begin one costs about as much as a tile. Of
    counts that take as long the first is the least, so that no block is empty.
    """

    def time(count: int) -> int:
        return cdiv(columns * count, multiprocessors) * (cdiv(rows, count) + 1)

    return min(range(1, min(rows, multiprocessors) + 1), key=time)
