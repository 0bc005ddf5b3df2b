"""Which problems the native kernels serve, and their launches on heads `[B, heads, H, W, D]`."""

import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import gpu as gpus
from ..geometry import Span
from ..integers import cdiv
from ..launch import Problem
from ..source import layout_of
from . import nvrtc
from .driver import Kernel, tensor_map
from .plan import Plan, choose

_ARCH = 90  # the first with tensor copies
_serving = True
_HALVES = torch.float16, torch.bfloat16
_SCALES = 2.0**-60, 2.0**60  # of logits: what is hidden stays far below what is seen
_MOST_BLOCKS = 65_535  # on the second and third axis of a grid


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
    """What a kernel is compiled for; `group` is of heads, the others but the dtype are of an axis."""

    task: str
    plan: Plan
    dtype: torch.dtype
    depth: int
    group: int
    kernel: tuple[int, int]
    lead: tuple[int, int]

    @property
    def options(self) -> tuple[str, ...]:
        """Of NVRTC, but for the architecture."""
        pairs, step = self.plan.pairs(self.kernel), "CHUNK" if self.task == "forward" else "UNROLL"
        names = {
            "BF16": int(self.dtype == torch.bfloat16),
            "DEPTH": self.depth,
            "GROUP": self.group,
            "KERNEL_H": self.kernel[0],
            "KERNEL_W": self.kernel[1],
            "LEAD_Y": self.lead[0],
            "LEAD_X": self.lead[1],
            "TILE_H": self.plan.tile[0],
            "TILE_W": self.plan.tile[1],
            "WARPS": self.plan.warps,
            "RESIDENT": self.plan.resident,
            step: min(self.plan.step, pairs),
        }
        return "--std=c++17", "-default-device", *(f"--define-macro={name}={value}" for name, value in names.items())

    @property
    def source(self) -> str:
        return _text("tile.cuh") + _text(f"{self.task}.cu")

    @property
    def shared(self) -> int:
        return self.plan.shared(self.task, self.group, self.depth, self.kernel)


@functools.cache
def _text(name: str) -> str:
    return (Path(__file__).parent / name).read_text()


class Native:
    """A launch of a task over kept tiles of some maps and the halos of others."""

    def __init__(self, compiled: Compiled, device: torch.device) -> None:
        self._kernel, self._device = _loaded(compiled, device), device
        th, tw = compiled.plan.tile
        channels, (kh, kw) = compiled.group * compiled.depth, compiled.kernel
        self._group, self._tile = compiled.group, (th, tw)
        self._kept, self._streamed = (channels, tw, th), (channels, tw + kw - 1, th + kh - 1)

    def __call__(self, kept: dict[int, Tensor], streamed: dict[int, Tensor], numbers: bytes) -> None:
        """kept, streamed: maps by their place among the kernel's arguments, which `numbers` follow."""
        boxed = {i: (x, self._kept) for i, x in kept.items()} | {i: (x, self._streamed) for i, x in streamed.items()}
        arguments = b"".join(tensor_map(*boxed[i]) for i in range(len(boxed))) + numbers
        batch, heads, h, w, _ = kept[min(kept)].shape
        th, tw = self._tile
        with torch.cuda.device(self._device):
            self._kernel((heads // self._group * cdiv(w, tw), cdiv(h, th), batch), arguments)


@functools.lru_cache(maxsize=1024)
def _loaded(compiled: Compiled, device: torch.device) -> Kernel:
    arch = f"--gpu-architecture=sm_{gpus.of(device).arch}"
    cubin = nvrtc.compiled(compiled.source, (arch, *compiled.options))
    with torch.cuda.device(device):
        return Kernel(cubin, compiled.task, 32 * compiled.plan.warps, compiled.shared)


_native = functools.lru_cache(maxsize=1024)(Native)


def native(task: str, problem: Problem, maps: tuple[Tensor, ...]) -> Native | None:
    """The launch of a task over maps [B, heads, H, W, D] of one dtype, of which the first is the query's; else None.

    Served are windows that slide over maps of half precision, pixel by pixel, whose keys outside of the map count as
    zeros, and no other terms of logits.
    """
    first = maps[0]
    heads, h, _, depth = first.shape[1:]
    rules, device = problem.rules, first.device
    if not _serving or first.dtype not in _HALVES or not _SCALES[0] <= abs(rules.scale) <= _SCALES[1]:
        return None
    if rules.bias is not None or rules.key_mask is not None or rules.window.raster or problem.group != 1:
        return None
    if not _slides(problem.spans) or not _available(device):
        return None
    if any(x.shape[4] != depth or not _side_by_side(x) for x in maps):
        return None
    kernel = rules.window.kernel
    plan = choose(task, heads, depth, kernel, _shared_limit(device))
    if plan is None or max(first.shape[0], cdiv(h, plan.tile[0])) > _MOST_BLOCKS:
        return None
    lead = problem.spans[0].lead, problem.spans[1].lead
    return _native(Compiled(task, plan, first.dtype, depth, plan.group(heads, depth), kernel, lead), device)


def _slides(spans: tuple[Span, Span]) -> bool:
    return all(
        span.border == "zeros" and span.dilation == span.lattice == 1 and not span.scaled and span.reach == span.kernel
        for span in spans
    )


@functools.cache
def _available(device: torch.device) -> bool:
    gpu = gpus.of(device)
    return gpu.nvidia and gpu.arch >= _ARCH and nvrtc.library() is not None


@functools.cache
def _shared_limit(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _side_by_side(x: Tensor) -> bool:
    """Whether a tensor map reads the channels of all heads as one axis."""
    return layout_of(x) == "rows" and (x.shape[1] == 1 or x.stride(1) == x.shape[4])


def numbers(form: str, *values: object) -> bytes:
    """Arguments after the maps, packed as a struct of that form."""
    return struct.pack(f"<{form}", *values)
