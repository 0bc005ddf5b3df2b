"""What a kernel is compiled for, what it is handed, and its blocks."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..integers import cdiv
from . import driver
from .plan import UNFUSED, Form, Plan, Shape, box, halo_maps, kept_columns, patterns, shape, shared, unit

T = TypeVar("T")


class Arguments(NamedTuple):
    """Of a kernel, as its struct of that name has them: maps, then numbers.

    kept: of each map, whether its pixels are kept, else halos are streamed. numbers: their form for `struct.pack`.
    results: how many of the maps are, the last.
    """

    kept: tuple[bool, ...]
    numbers: str
    results: int = 1

    def of_maps(self, kept: T, halo: T, result: T) -> tuple[T, ...]:
        """What stands for each map: one of these, by whether it is kept, streamed or a result."""
        inputs = self.kept[: len(self.kept) - self.results]
        return (*(kept if keeps else halo for keeps in inputs), *[result] * self.results)


ARGUMENTS = {
    "forward": Arguments((True, False, False, True), "<QiiifI"),
    "grad_query": Arguments((True, False, False, True, True, True), "<QQQiiiffI"),
    "grad_key_value": Arguments((False, True, True, False, True, True), "<QQiiiffII", 2),
    "similarity": Arguments((True, False), "<Qiiif", 0),
    "aggregate": Arguments((False, True), "<Qiiif"),
    "aggregate_transpose": Arguments((False, True), "<Qiiif"),
}


class Compiled(NamedTuple):
    """What a kernel is compiled for; `group` is of heads, `kernel` and `lead` are of both axes.

    strip: blocks of a row before the next row comes, 0 is all; working it out delays a block's copies.
    """

    task: str
    plan: Plan
    form: Form
    dtype: torch.dtype
    depth: int
    group: int
    kernel: tuple[int, int]
    lead: tuple[int, int]
    strip: int = 0

    @property
    def shape(self) -> Shape:
        return shape(self.task, self.plan, self.kernel, lead_of(self.task, self.kernel[1], self.lead[1]), self.form)

    @property
    def patterns(self) -> tuple[int, int]:
        return patterns(self.plan, self.shape, self.group * self.depth, self.form)

    @property
    def options(self) -> tuple[str, ...]:
        """Of NVRTC, but for the architecture."""
        held, plan, (tile_pattern, halo_pattern) = self.shape, self.plan, self.patterns
        sizes = {
            "KERNEL": self.kernel,
            "TILE": plan.tile,
            "UNIT": unit(self.task, self.form),
            "SUB": held.sub,
            "SEEN": held.seen,
        }
        names = {f"{name}_{axis}": size for name, both in sizes.items() for axis, size in zip("HW", both, strict=True)}
        names |= {
            "BF16": int(self.dtype == torch.bfloat16),
            "PLANES": int(self.form.planes),
            "ELEMENT": self.form.element,
            "PASSES": 3 if self.form.product == "three-pass" else 1,
            "KEPT_MAPS": 1 if self.task in ("forward", "similarity") else 2,
            "HALO_MAPS": halo_maps(self.task),
            "DEPTH": self.depth,
            "STRIP": self.strip,
            "GROUP": self.group,
            "LEAD_Y": self.lead[0],
            "LEAD_X": self.lead[1],
            "BAND_H": held.band[0],
            "HALO_W": held.band[1],
            "BANDS": held.bands,
            "SLOTS": plan.slots,
            "PAD": held.pad,
            "SKIP": held.skip,
            "BEFORE": held.before,
            "OFFSET": held.offset,
            "TILE_PATTERN": tile_pattern,
            "HALO_PATTERN": halo_pattern,
            "WARPS": plan.warps,
            "SHARED_BY": plan.shared_by,
            "RESIDENT": plan.resident,
            "AT_ONCE": min(plan.step, held.pairs),
        }
        return options_of(names)

    @property
    def files(self) -> tuple[str, ...]:
        """Of the source, one after the other, but for what only a GPU can do."""
        numbers = "half.cuh" if self.form.product == "half" else "single.cuh"
        of_weights = self.task in UNFUSED
        of_pairs = (numbers, "seen.cuh", "weights.cuh") if of_weights else ("visibility.cuh", numbers, "seen.cuh")
        of_queries = ("queries.cuh",) if self.task == "grad_key_value" else ()
        return "basics.cuh", "geometry.cuh", "copies.cuh", *of_pairs, *of_queries, f"{self.task}.cu"

    @property
    def source(self) -> str:
        return self.machine + self.program

    @property
    def machine(self) -> str:
        """Source of what only a GPU can do."""
        return text("instructions.cuh")

    @property
    def program(self) -> str:
        """The rest."""
        return "".join(map(text, self.files))

    @property
    def name(self) -> str:
        """Of the kernel."""
        return self.task

    @property
    def features(self) -> str:
        """Of the architecture, as its name has them."""
        return ""

    @property
    def threads(self) -> int:
        return 32 * self.plan.warps

    @property
    def early(self) -> bool:
        """Whether launches may begin before the last one has ended.

        That saves up to 2 us. But then the L1 cache has the size that the last kernel left it, on which unfused kernels
        and those of floats depend, for they read maps and weights through it: windows past 7x7 lose more, and TF32.
        """
        short = self.form.product == "three-pass" and max(self.kernel) <= 7
        return self.task not in UNFUSED and (self.form.product == "half" or short)

    @property
    def shared(self) -> int:
        return shared(self.task, self.plan, self.group, self.depth, self.kernel, self.shape, self.form)

    @property
    def described(self) -> tuple[Callable[[Tensor], bytes], ...]:
        """How the kernel's arguments describe each map."""
        channels, form, held = self.group * self.depth, self.form, self.shape
        tile, halo = (
            functools.partial(driver.tensor_map, form.axes, box(size, channels, form), pattern)
            for size, pattern in zip((self._kept_box, held.band), self.patterns, strict=True)
        )
        kept = tile if form.product == "half" else driver.strided_map
        return ARGUMENTS[self.task].of_maps(kept, halo, driver.strided_map if held.offset else kept)

    @property
    def _kept_box(self) -> tuple[int, int]:
        return self.plan.tile[0], kept_columns(self.plan, self.shape)

    def grid(self, batch: int, heads: int, h: int, w: int) -> tuple[int, int, int]:
        th, tw = self.plan.tile
        return heads // self.group * cdiv(w + self.shape.before, tw), cdiv(h, th), batch


def lead_of(task: str, kernel: int, lead: int) -> int:
    """From the first pixel that a kept one sees to it, for a window whose first key lies `lead` before the query."""
    return kernel - 1 - lead if task in ("grad_key_value", "aggregate_transpose") else lead


def options_of(names: dict[str, int]) -> tuple[str, ...]:
    """Of NVRTC, for a source that is given these numbers by name."""
    return "--std=c++17", "-default-device", *(f"--define-macro={name}={value}" for name, value in names.items())


@functools.cache
def text(name: str) -> str:
    return (Path(__file__).parent / name).read_text()
