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
from ..launch import MOST_PROGRAMS, Problem
from ..source import ALIGNMENT, descriptor_strides
from . import nvrtc
from .driver import Kernel, tensor_map
from .plan import Plan, Shape, choose, patterns, shape, shared

_ARCH = 90  # the first with tensor copies
_HALVES = torch.float16, torch.bfloat16
_SCALES = 2.0**-60, 2.0**60  # of logits: what is hidden stays far below what is seen


class Arguments(NamedTuple):
    """Of a kernel, as its struct of that name has them: maps, then numbers.

    kept: of each map, whether tiles are kept, else halos are streamed. numbers: their form for `struct.pack`.
    """

    kept: tuple[bool, ...]
    numbers: str


ARGUMENTS = {
    "forward": Arguments((True, False, False, True), "<QiiifI"),
    "grad_query": Arguments((True, False, False, True, True, True), "<QQQiiiffI"),
    "grad_key_value": Arguments((False, True, True, False, True, True), "<QQiiiffI"),
}

_serving = True


@contextmanager
def portable() -> Iterator[None]:
    """Within, nothing is served here and Triton's kernels run instead: to compare, and to measure them."""
    global _serving
    before, _serving = _serving, False
    try:
        yield
    finally:
        _serving = before


class Compiled(NamedTuple):
    """What a kernel is compiled for; `group` is of heads, `kernel` and `lead` are of both axes."""

    task: str
    plan: Plan
    planes: bool
    dtype: torch.dtype
    depth: int
    group: int
    kernel: tuple[int, int]
    lead: tuple[int, int]

    @property
    def shape(self) -> Shape:
        return shape(self.plan, self.kernel, _lead(self.task, self.kernel[1], self.lead[1]), self.planes)

    @property
    def patterns(self) -> tuple[int, int]:
        return patterns(self.plan, self.shape, self.group * self.depth, self.planes)

    @property
    def options(self) -> tuple[str, ...]:
        """Of NVRTC, but for the architecture."""
        held, (tile_pattern, halo_pattern) = self.shape, self.patterns
        names = {
            "BF16": int(self.dtype == torch.bfloat16),
            "PLANES": int(self.planes),
            "DEPTH": self.depth,
            "GROUP": self.group,
            "KERNEL_H": self.kernel[0],
            "KERNEL_W": self.kernel[1],
            "LEAD_Y": self.lead[0],
            "LEAD_X": self.lead[1],
            "TILE_H": self.plan.tile[0],
            "TILE_W": self.plan.tile[1],
            "PAD": held.pad,
            "TILE_PATTERN": tile_pattern,
            "HALO_PATTERN": halo_pattern,
            "WARPS": self.plan.warps,
            "RESIDENT": self.plan.resident,
            "CHUNK" if self.task == "forward" else "UNROLL": min(self.plan.step, held.pairs),
        }
        return "--std=c++17", "-default-device", *(f"--define-macro={name}={value}" for name, value in names.items())

    @property
    def source(self) -> str:
        return _text("tile.cuh") + _text(f"{self.task}.cu")

    @property
    def shared(self) -> int:
        return shared(self.task, self.plan, self.group, self.depth, self.shape)


def _lead(task: str, kernel: int, lead: int) -> int:
    """From the first pixel that a kept one sees to it, for a window whose first key lies `lead` before the query."""
    return kernel - 1 - lead if task == "grad_key_value" else lead


@functools.cache
def _text(name: str) -> str:
    return (Path(__file__).parent / name).read_text()


class Native:
    """A launch of a task over kept tiles of some maps and the halos of others."""

    def __init__(self, compiled: Compiled, device: torch.device) -> None:
        self._kernel, self._device = _loaded(compiled, device), device.index
        self._group, self._tile = compiled.group, compiled.plan.tile
        channels, planes = compiled.group * compiled.depth, compiled.planes
        pixels = self._tile, compiled.shape.halo
        boxes = ((w, h, channels) if planes else (channels, w, h) for h, w in pixels)
        tile, halo = ((planes, *each) for each in zip(boxes, compiled.patterns, strict=True))
        arguments = ARGUMENTS[compiled.task]
        self._copies = tuple(tile if kept else halo for kept in arguments.kept)
        self._pack = struct.Struct(arguments.numbers).pack

    def __call__(self, maps: tuple[Tensor, ...], *numbers: float) -> None:
        """maps, numbers: the kernel's arguments in their order."""
        copies = [tensor_map(x, *copy) for x, copy in zip(maps, self._copies, strict=True)]
        batch, heads, h, w, _ = maps[0].shape
        th, tw = self._tile
        grid = heads // self._group * cdiv(w, tw), cdiv(h, th), batch
        with torch.cuda.device(self._device):
            self._kernel(grid, b"".join((*copies, self._pack(*numbers))))


@functools.lru_cache(maxsize=1024)
def _loaded(compiled: Compiled, device: torch.device) -> Kernel:
    arch = f"--gpu-architecture=sm_{gpus.of(device).arch}"
    cubin = nvrtc.compiled(compiled.source, (arch, *compiled.options))
    with torch.cuda.device(device):
        return Kernel(cubin, compiled.task, 32 * compiled.plan.warps, compiled.shared)


def native(task: str, problem: Problem, maps: tuple[Tensor, ...]) -> Native | None:
    """The launch of a task over maps [B, heads, H, W, D] of one dtype, the kernel's arguments; None: it is not served.

    Served are windows that slide over maps of half precision, pixel by pixel, whose keys outside of the map count as
    zeros, and no other terms of logits.
    """
    rules, first = problem.rules, maps[0]
    if not _serving or rules.bias is not None or rules.key_mask is not None:
        return None
    if first.dtype not in _HALVES or not _SCALES[0] <= abs(rules.scale) <= _SCALES[1]:
        return None
    if problem.group != 1 or any(x.data_ptr() % ALIGNMENT for x in maps):
        return None
    geometry = tuple((x.shape, x.stride()) for x in maps)
    return _native(task, rules.window, problem.spans, geometry, first.dtype, first.device)


# Every call of a model asks for the same few.
@functools.lru_cache(maxsize=4096)
def _native(
    task: str,
    window: Window,
    spans: tuple[Span, Span],
    geometry: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Native | None:
    """geometry: shape and strides of every map."""
    if window.raster or not _slides(spans) or not _available(device):
        return None
    batch, heads, h, w, depth = geometry[0][0]
    way = "rows" if _in_a_row("rows", *geometry[0]) else "planes"
    if any(shape[4] != depth or not _in_a_row(way, shape, strides) for shape, strides in geometry):
        return None
    planes = way == "planes"
    kernel, lead = window.kernel, (spans[0].lead, spans[1].lead)
    of_maps = planes, heads, depth, batch * heads * h * w
    plan = choose(task, *of_maps, kernel, _lead(task, kernel[1], lead[1]), _shared_limit(device))
    if plan is None or max(batch, cdiv(h, plan.tile[0])) > MOST_PROGRAMS:
        return None
    return Native(Compiled(task, plan, planes, dtype, depth, plan.group(heads, depth, planes), kernel, lead), device)


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


def _in_a_row(way: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a tensor map of a way reads the channels of all heads as one axis."""
    in_a_row = shape[1] == 1 or strides[1] == shape[4] * strides[4]
    return in_a_row and descriptor_strides(way, shape, strides, 2) is not None
