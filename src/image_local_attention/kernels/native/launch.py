"""Which problems the native kernels serve, and their launches on heads `[B, heads, H, W, D]`."""

import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...window import Window
from .. import gpu as gpus
from ..geometry import Span
from ..integers import cdiv
from ..launch import MOST_PROGRAMS, Problem, strip_tiles
from ..source import ALIGNMENT, descriptor_strides
from . import nvrtc
from .driver import Kernel, strided_map, tensor_map
from .plan import UNFUSED, Form, Plan, Shape, box, halo_maps, patterns, shape, shared, unit
from .table import choose

_ARCH = 90  # the first with tensor copies
_DTYPES = torch.float16, torch.bfloat16, torch.float32
_SCALES = 2.0**-60, 2.0**60  # of logits: what is hidden stays far below what is seen
_MOST_BYTES = 2**31 - 1  # of weights of the rows that a tile sees: lanes count them in 32 bits


class Arguments(NamedTuple):
    """Of a kernel, as its struct of that name has them: maps, then numbers.

    kept: of each map, whether its pixels are kept, else halos are streamed. numbers: their form for `struct.pack`.
    """

    kept: tuple[bool, ...]
    numbers: str


ARGUMENTS = {
    "forward": Arguments((True, False, False, True), "<QiiifI"),
    "grad_query": Arguments((True, False, False, True, True, True), "<QQQiiiffI"),
    "grad_key_value": Arguments((False, True, True, False, True, True), "<QQiiiffII"),
    "similarity": Arguments((True, False), "<Qiiif"),
    "aggregate": Arguments((False, True), "<Qiiif"),
    "aggregate_transpose": Arguments((False, True), "<Qiiif"),
}

_serving = True
_forced: dict[str, Plan] = {}


@contextmanager
def portable() -> Iterator[None]:
    """Within, nothing is served here and Triton's kernels run instead: to compare, and to measure them."""
    global _serving
    before, _serving = _serving, False
    try:
        yield
    finally:
        _serving = before


@contextmanager
def using(task: str, plan: Plan) -> Iterator[None]:
    """Within, a task that can be served takes this plan, whatever the table says: to test and to time plans."""
    global _forced
    before, _forced = _forced, _forced | {task: plan}
    try:
        yield
    finally:
        _forced = before


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
        return shape(self.task, self.plan, self.kernel, _lead(self.task, self.kernel[1], self.lead[1]), self.form)

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
            "TILE_PATTERN": tile_pattern,
            "HALO_PATTERN": halo_pattern,
            "WARPS": plan.warps,
            "SHARED_BY": plan.shared_by,
            "RESIDENT": plan.resident,
            "AT_ONCE": min(plan.step, held.pairs),
        }
        return "--std=c++17", "-default-device", *(f"--define-macro={name}={value}" for name, value in names.items())

    @property
    def files(self) -> tuple[str, ...]:
        """Of the source, one after the other; the first has what only a GPU can do."""
        numbers = "half.cuh" if self.form.product == "half" else "single.cuh"
        of_weights = self.task in UNFUSED
        of_pairs = (numbers, "seen.cuh", "weights.cuh") if of_weights else ("visibility.cuh", numbers, "seen.cuh")
        of_queries = ("queries.cuh",) if self.task == "grad_key_value" else ()
        return "instructions.cuh", "geometry.cuh", "copies.cuh", *of_pairs, *of_queries, f"{self.task}.cu"

    @property
    def source(self) -> str:
        return "".join(map(text, self.files))

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


def _lead(task: str, kernel: int, lead: int) -> int:
    """From the first pixel that a kept one sees to it, for a window whose first key lies `lead` before the query."""
    return kernel - 1 - lead if task in ("grad_key_value", "aggregate_transpose") else lead


@functools.cache
def text(name: str) -> str:
    return (Path(__file__).parent / name).read_text()


class Native:
    """A launch of a task over kept tiles of some maps and the halos of others."""

    def __init__(self, compiled: Compiled, device: torch.device) -> None:
        self._kernel, self._device = _loaded(compiled, device), device.index
        self._group, self._tile = compiled.group, compiled.plan.tile
        channels, form = compiled.group * compiled.depth, compiled.form
        pixels = self._tile, compiled.shape.band
        tile, halo = (
            functools.partial(tensor_map, form.axes, box(size, channels, form), pattern)
            for size, pattern in zip(pixels, compiled.patterns, strict=True)
        )
        kept = tile if form.product == "half" else strided_map
        arguments = ARGUMENTS[compiled.task]
        self._described = tuple(kept if keeps else halo for keeps in arguments.kept)
        self._pack = struct.Struct(arguments.numbers).pack

    def __call__(self, maps: tuple[Tensor, ...], *numbers: float) -> None:
        """maps, numbers: the kernel's arguments in their order."""
        described = [describe(x) for x, describe in zip(maps, self._described, strict=True)]
        batch, heads, h, w, _ = maps[0].shape
        th, tw = self._tile
        grid = heads // self._group * cdiv(w, tw), cdiv(h, th), batch
        with torch.cuda.device(self._device):
            self._kernel(grid, b"".join((*described, self._pack(*numbers))))


@functools.lru_cache(maxsize=1024)
def _loaded(compiled: Compiled, device: torch.device) -> Kernel:
    arch = f"--gpu-architecture=sm_{gpus.of(device).arch}"
    cubin = nvrtc.compiled(compiled.source, (arch, *compiled.options))
    with torch.cuda.device(device):
        return Kernel(cubin, compiled.task, 32 * compiled.plan.warps, compiled.shared, compiled.early)


def native(task: str, problem: Problem, maps: tuple[Tensor, ...]) -> Native | None:
    """The launch of a task over maps [B, heads, H, W, D] of one dtype, the kernel's arguments; None: it is not served.

    Served are windows that slide over maps pixel by pixel, whose keys outside of the map count as zeros, and no other
    terms of logits.
    """
    rules, first = problem.rules, maps[0]
    if not _serving or rules.bias is not None or rules.key_mask is not None:
        return None
    hides = task not in UNFUSED
    if first.dtype not in _DTYPES or (hides and not _SCALES[0] <= abs(rules.scale) <= _SCALES[1]):
        return None
    if problem.group != 1 or any(x.data_ptr() % ALIGNMENT for x in maps):
        return None
    geometry = tuple((x.shape, x.stride()) for x in maps)
    return _native(
        task, rules.window, problem.spans, geometry, first.dtype, rules.precision, first.device, _forced.get(task)
    )


# Every call of a model asks for the same few.
@functools.lru_cache(maxsize=4096)
def _native(
    task: str,
    window: Window,
    spans: tuple[Span, Span],
    geometry: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...],
    dtype: torch.dtype,
    precision: str,
    device: torch.device,
    forced: Plan | None,
) -> Native | None:
    """geometry: shape and strides of every map. precision: of fp32 products. forced: a plan instead of the table's."""
    if window.raster or not _slides(spans) or not _available(device):
        return None
    batch, heads, h, w, depth = geometry[0][0]
    element = dtype.itemsize
    way = "rows" if _in_a_row("rows", *geometry[0], element) else "planes"
    if any(shape[4] != depth or not _in_a_row(way, shape, strides, element) for shape, strides in geometry):
        return None
    form = Form(gpus.of(device).product(dtype, precision), way == "planes")
    kernel, lead = window.kernel, (spans[0].lead, spans[1].lead)
    of_maps = form, heads, depth, batch * heads * h * w
    plan = forced or choose(task, *of_maps, kernel, _lead(task, kernel[1], lead[1]), _shared_limit(device))
    if plan is None or max(batch, cdiv(h, plan.tile[0])) > MOST_PROGRAMS:
        return None
    if task == "aggregate_transpose" and w * window.slots * element * (kernel[0] + plan.tile[0]) > _MOST_BYTES:
        return None
    group, halos = plan.group(heads, depth, form), ARGUMENTS[task].kept.count(False)
    sees = plan.tile[0] + kernel[0] - 1, kernel[1]
    strip = heads // group * strip_tiles(cdiv(w, plan.tile[1]), plan.tile[1], sees, halos * heads * depth * element)
    return Native(Compiled(task, plan, form, dtype, depth, group, kernel, lead, strip), device)


def _slides(spans: tuple[Span, Span]) -> bool:
    return all(
        span.border == "zeros" and span.dilation == span.lattice == 1 and not span.scaled and span.reach == span.kernel
        for span in spans
    )


def _available(device: torch.device) -> bool:
    gpu = gpus.of(device)
    if not gpu.nvidia or gpu.arch < _ARCH or nvrtc.library() is None:
        return False
    return gpu.arch in nvrtc.architectures()


def _shared_limit(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _in_a_row(way: str, shape: tuple[int, ...], strides: tuple[int, ...], element: int) -> bool:
    """Whether a tensor map of a way reads the channels of all heads as one axis. element: bytes of a number."""
    in_a_row = shape[1] == 1 or strides[1] == shape[4] * strides[4]
    return in_a_row and descriptor_strides(way, shape, strides, element) is not None
