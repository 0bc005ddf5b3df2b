"""Which problems the native kernels serve, and their launches on heads `[B, heads, H, W, D]`."""

import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...window import Window
from .. import gpu as gpus
from ..geometry import Span
from ..integers import cdiv
from ..launch import MOST_PROGRAMS, Problem, strip_tiles
from ..source import ALIGNMENT, descriptor_strides
from . import nvrtc, table, walk, walk_table
from .compiled import ARGUMENTS, Compiled, lead_of
from .driver import Kernel
from .plan import UNFUSED, Form, Plan

_ARCH = 90  # the first with tensor copies
_DTYPES = torch.float16, torch.bfloat16, torch.float32
_SCALES = 2.0**-60, 2.0**60  # of logits: what is hidden stays far below what is seen
_MOST_BYTES = 2**31 - 1  # of weights of the rows that a tile sees: lanes count them in 32 bits

_serving = True
_forced: dict[str, Plan | walk.WalkPlan] = {}


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
def using(task: str, plan: Plan | walk.WalkPlan) -> Iterator[None]:
    """Within, a task that can be served takes this plan, whatever the table says: to test and to time plans."""
    global _forced
    before, _forced = _forced, _forced | {task: plan}
    try:
        yield
    finally:
        _forced = before


class Native:
    """A launch of a task over kept tiles of some maps and the halos of others."""

    def __init__(self, compiled: Compiled | walk.Walk, device: torch.device) -> None:
        self._kernel, self._device = _loaded(compiled, device), device.index
        self._described, self._grid = compiled.described, compiled.grid
        self._pack = struct.Struct(ARGUMENTS[compiled.task].numbers).pack

    def __call__(self, maps: tuple[Tensor, ...], *numbers: float) -> None:
        """maps, numbers: the kernel's arguments in their order."""
        described = [describe(x) for x, describe in zip(maps, self._described, strict=True)]
        grid = self._grid(*maps[0].shape[:4])
        with torch.cuda.device(self._device):
            self._kernel(grid, b"".join((*described, self._pack(*numbers))))


@functools.lru_cache(maxsize=1024)
def _loaded(compiled: Compiled | walk.Walk, device: torch.device) -> Kernel:
    arch = f"--gpu-architecture=sm_{gpus.of(device).arch}{compiled.features}"
    cubin = nvrtc.compiled(compiled.source, (arch, *compiled.options))
    with torch.cuda.device(device):
        return Kernel(cubin, compiled.name, compiled.threads, compiled.shared, compiled.early)


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
    forced: Plan | walk.WalkPlan | None,
) -> Native | None:
    """geometry: shape and strides of every map. precision: of fp32 products. forced: a plan instead of the table's."""
    if window.raster or not _slides(spans) or not _available(device):
        return None
    batch, heads, h, w, depth = geometry[0][0]
    element = dtype.itemsize
    way = "rows" if _in_a_row("rows", *geometry[0], element) else "planes"
    if any(shape[4] != depth or not _in_a_row(way, shape, strides, element) for shape, strides in geometry):
        return None
    gpu = gpus.of(device)
    form, pixels = Form(gpu.product(dtype, precision), way == "planes"), batch * heads * h * w
    kernel, lead = window.kernel, (spans[0].lead, spans[1].lead)
    limit = _shared_limit(device)
    if walk_table.serves(task, form, depth, w, gpu.arch) and batch <= MOST_PROGRAMS:
        plan = forced or walk_table.choose(task, form.planes, depth, pixels, h * w, kernel)
        if isinstance(plan, walk.WalkPlan):
            walks = walk.Walk(task, plan, form.planes, dtype, depth, kernel, lead, _multiprocessors(device))
            if walks.fits and walks.shared <= limit:
                return Native(walks, device)
    if isinstance(forced, walk.WalkPlan):
        return None
    seen_lead = lead_of(task, kernel[1], lead[1])
    plan = forced or table.choose(task, form, heads, depth, pixels, kernel, seen_lead, limit)
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


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _in_a_row(way: str, shape: tuple[int, ...], strides: tuple[int, ...], element: int) -> bool:
    """Whether a tensor map of a way reads the channels of all heads as one axis. element: bytes of a number."""
    in_a_row = shape[1] == 1 or strides[1] == shape[4] * strides[4]
    return in_a_row and descriptor_strides(way, shape, strides, element) is not None
