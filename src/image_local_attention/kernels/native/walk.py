"""Kernels whose blocks walk down a map, of the products of 64 rows that sm_90 has: what they serve and hold."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..integers import cdiv
from . import driver
from .compiled import options_of, text
from .plan import Form

_ARCH = 90  # no other GPU has these products
_DEPTH = 64  # channels of a head, 128 bytes: a row of a swizzle's pattern
_SIDE = 8  # of a tile
_BAND_H = 4
_GROUPS = 2
_GROUP_THREADS = 128
_PIXEL_BYTES = 128
_BARRIERS = 16  # bytes of a slot
_QUERY_BYTES = 8  # of log-sum-exp and delta
_PATTERN = 1024
# Sums of bands of wider windows would take more registers than there are. Of those taller than 33, a group would hold
# more bands, which its next tile sees again, than there are slots beside those that it waits for.
_LARGEST = 21
# From which windows on it is faster than the kernel of `table`: milliseconds with delta on an H200, then that kernel's.
# 512-64-k9 0.119 : 0.118, k11 0.135 : 0.158, k13 0.140 : 0.156, k15 0.173 : 0.230, k17 0.178 : 0.220,
# k19 0.209 : 0.296, k21 0.214 : 0.267; 8x128-8x64-k13 0.537 : 0.568, k21 0.820 : 1.014; 128-64-k21 0.0228 : 0.0252.
_LEAST = 11
_SHAPE = "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{type}.{type}"


@dataclass(frozen=True)
class WalkPlan:
    """slots: bands of a halo that are held at once."""

    slots: int = 6


class Walk(NamedTuple):
    """What a kernel is compiled for, and how it is launched; `kernel` and `lead` are of both axes.

    multiprocessors: of the GPU, which blocks are to share evenly.
    """

    task: str
    plan: WalkPlan
    dtype: torch.dtype
    kernel: tuple[int, int]
    lead: tuple[int, int]
    multiprocessors: int

    @property
    def halo(self) -> tuple[int, int]:
        """Rows and columns of a band."""
        return _BAND_H, cdiv(_SIDE + self.kernel[1] - 1, 4) * 4

    @property
    def name(self) -> str:
        return f"walk_{self.task}"

    @property
    def options(self) -> tuple[str, ...]:
        """Of NVRTC, but for the architecture."""
        names = {
            "BF16": int(self.dtype == torch.bfloat16),
            "KERNEL_H": self.kernel[0],
            "KERNEL_W": self.kernel[1],
            "LEAD_Y": self.lead[0],
            "LEAD_X": self.lead[1],
            "SLOTS": self.plan.slots,
        }
        return options_of(names)

    @property
    def source(self) -> str:
        return self.machine + self.program

    @property
    def machine(self) -> str:
        """Source of what only a GPU can do."""
        rows, columns = self.halo
        products = _products(rows * columns, "bf16" if self.dtype == torch.bfloat16 else "f16")
        return text("instructions.cuh") + text("hopper.cuh") + products

    @property
    def program(self) -> str:
        """The rest."""
        return "".join(map(text, ("basics.cuh", "walk.cuh", f"{self.name}.cu")))

    @property
    def features(self) -> str:
        """Of the architecture, as its name has them."""
        return "a"

    @property
    def threads(self) -> int:
        return (_GROUPS + 1) * _GROUP_THREADS

    @property
    def early(self) -> bool:
        """Little goes through the L1 cache."""
        return True

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a block takes."""
        pixels = self.halo[0] * self.halo[1]
        band = 2 * pixels * _PIXEL_BYTES + cdiv(pixels * _QUERY_BYTES, _PATTERN) * _PATTERN
        kept = 2 * _SIDE * _SIDE * _PIXEL_BYTES
        return self.plan.slots * (band + _BARRIERS) + _GROUPS * (kept + _BARRIERS)

    @property
    def described(self) -> tuple[Callable[[Tensor], bytes], ...]:
        """How the kernel's arguments describe each map."""
        halo, tile = (
            functools.partial(driver.tensor_map, "cxy", (_DEPTH, columns, rows), _PIXEL_BYTES)
            for rows, columns in (self.halo, (_SIDE, _SIDE))
        )
        return halo, tile, tile, halo, driver.strided_map, driver.strided_map

    def grid(self, batch: int, heads: int, h: int, w: int) -> tuple[int, int, int]:
        rows, columns = cdiv(h, _SIDE), heads * cdiv(w, _SIDE)
        return columns, parts(rows, columns * batch, self.multiprocessors), batch


def serves(task: str, form: Form, depth: int, kernel: tuple[int, int], arch: int) -> bool:
    """Whether such a kernel can take a task over maps of a form, of so many channels per head."""
    of_maps = form == Form("half", planes=False) and depth == _DEPTH
    return task == "grad_key_value" and of_maps and max(kernel) <= _LARGEST and arch == _ARCH


def choose(kernel: tuple[int, int]) -> WalkPlan | None:
    """The plan of a task that can be taken; None where blocks are not to walk."""
    return WalkPlan() if min(kernel) >= _LEAST else None


@functools.lru_cache(maxsize=1024)
def parts(rows: int, columns: int, multiprocessors: int) -> int:
    """Into how many blocks columns of so many tiles are cut, for the last to end soon.

    Each multiprocessor takes one block after the other; to begin one costs about as much as a tile. Of
    counts that take as long the first is the least, so that no block is empty.
    """

    def time(count: int) -> int:
        return cdiv(columns * count, multiprocessors) * (cdiv(rows, count) + 1)

    return min(range(1, min(rows, multiprocessors) + 1), key=time)


def _products(columns: int, number: str) -> str:
    """Source of the products of a group with `columns` pixels of a band: scores, and weighted sums of 64 channels."""
    scores = _product(columns, number, "const SharedRows& a", ['"l"(a.descriptor())'], "%{0}", "1, 1, 0, 0")
    weights = [f'"r"(a[{i}])' for i in range(4)]
    sums = _product(_DEPTH, number, "const u32 (&a)[4]", weights, "{{%{0}, %{1}, %{2}, %{3}}}", "1, 1, 1")
    return (
        "\n// sums = or += a b, 64 rows of 16 channels in shared memory with as many of pixels side by side there.\n"
        f"INLINE void multiply_shared{scores}"
        "\n// sums = or += a b, 64 rows of 16 numbers in registers with 16 pixels' 64 channels in shared memory.\n"
        f"INLINE void multiply_held{sums}"
    )


def _product(columns: int, number: str, a: str, operands: list[str], named: str, signs: str) -> str:
    """Parameters and body of a product. named: how the instruction has the first factor; signs: what it ends with."""
    count = columns // 2
    sums, bound = (", ".join(form.format(i) for i in range(count)) for form in ("%{}", '"+f"(sums[{}])'))
    first = named.format(*range(count, count + len(operands)))
    b, add = count + len(operands), count + len(operands) + 1
    shape = _SHAPE.format(columns=columns, type=number)
    return f"""(float (&sums)[{count}], {a}, const SharedRows& b, bool add) {{
  asm volatile("{{\\n.reg .pred add;\\nsetp.ne.b32 add, %{add}, 0;\\n"
               "{shape} {{{sums}}}, {first}, %{b}, add, {signs};\\n}}"
               : {bound}
               : {", ".join(operands)}, "l"(b.descriptor()), "r"(int(add)));
}}
"""
