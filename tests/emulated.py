"""Native kernels on a CPU: compiled by a C++ compiler with `emulator.h` for the GPU's instructions."""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

from image_local_attention.kernels.gpu import Gpu
from image_local_attention.kernels.native import driver, launch
from image_local_attention.kernels.native.compiled import Compiled
from image_local_attention.kernels.native.walk import Walk

COMPILER = shutil.which("g++")
HEADER, HOPPER = (Path(__file__).parent / name for name in ("emulator.h", "emulator_hopper.h"))
BUILT = Path(__file__).parents[1] / "build" / "emulated"
FLAGS = "-std=c++17", "-O1", "-w", "-Wno-psabi", "-fno-strict-aliasing", "-fPIC", "-U_FORTIFY_SOURCE"
ALIGNMENT = 64
SHARED = 227 * 1024
MULTIPROCESSORS = 2  # so that blocks walk
RUN = """
extern "C" void run(const Arguments* a, const int* grid, int late) {
  BEFORE
  emulator::launch(grid, THREADS, late, [=] { KERNEL(*a); });
}
"""
# A launch that may begin before delta is there finds none before it waits.
BEFORE = """
  float* delta = const_cast<float*>(a->delta);
  const long long count = (long long)grid[2] * a->heads * a->height * a->width;
  if (a->after_grad_query) {
    emulator::before = [delta, made = std::vector<float>(delta, delta + count)] {
      std::copy(made.begin(), made.end(), delta);
    };
    std::fill_n(delta, count, NAN);
  }
"""


class Kernel:
    """Stands for a kernel of a cubin. late: copies are done when they are waited for."""

    def __init__(self, library: ctypes.CDLL, late: bool) -> None:
        self._run, self._late = library.run, late

    def __call__(self, grid: tuple[int, int, int], arguments: bytes) -> None:
        held = ctypes.create_string_buffer(len(arguments) + ALIGNMENT)
        start = -ctypes.addressof(held) % ALIGNMENT
        held[start : start + len(arguments)] = arguments
        self._run(ctypes.c_void_p(ctypes.addressof(held) + start), (ctypes.c_int * 3)(*grid), int(self._late))


def digest(*parts: object) -> str:
    return hashlib.sha256(repr((parts, FLAGS)).encode()).hexdigest()[:32]


def kept(path: Path, *options: str | Path, source: str = "") -> Path:
    """What the compiler makes, once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = path.with_name(f"{path.name}.{os.getpid()}")  # other processes may build the same
        subprocess.run([COMPILER, *FLAGS, *options, "-o", mine], input=source, text=True, check=True)
        mine.replace(path)
    return path


@functools.cache
def header() -> Path:
    """The emulator, which is compiled ahead: a compiler takes what lies beside a header in its place."""
    path = BUILT / f"{digest(HEADER.read_text())}.h"
    kept(path.with_suffix(".h.gch"), "-x", "c++-header", HEADER)
    shutil.copyfile(HEADER, path)  # for a compiler that has no use for what another made
    return path


@functools.cache
def library(compiled: Compiled | Walk) -> ctypes.CDLL:
    macros = [option.replace("--define-macro=", "-D") for option in compiled.options if "define" in option]
    before = BEFORE if compiled.task == "grad_key_value" else ""
    run = RUN.replace("KERNEL", compiled.name).replace("BEFORE", before).replace("THREADS", str(compiled.threads))
    source = "".join((HOPPER.read_text() if compiled.features else "", compiled.program, run))
    path = BUILT / f"{digest(header().name, source, macros)}.so"
    options = *macros, "-include", header(), "-shared", "-x", "c++", "-"
    return ctypes.CDLL(str(kept(path, *options, source=source)))


def tensor_map(axes: str, box: tuple[int, ...], pattern: int, x: Tensor) -> bytes:
    """As `emulator.h` reads it."""
    batch, heads, h, w, depth = x.shape
    element, channels = x.element_size(), depth if "h" in axes else heads * depth
    of_axes = {"c": (channels, x.stride(4)), "x": (w, x.stride(3)), "y": (h, x.stride(2)), "h": (heads, x.stride(1))}
    rest = [(1, 0)] * (4 - len(axes))
    sizes, steps = zip(*(of_axes[axis] for axis in axes), (batch, x.stride(0)), *rest, strict=True)
    steps = (step * element for step in steps[1:])
    return struct.pack("<15Q8x", x.data_ptr(), element, pattern, *sizes, *steps, *box[:3])


@contextlib.contextmanager
def emulated(late: bool) -> Iterator[list[str]]:
    """Within, native kernels run on a CPU; gives the tasks that do."""
    tasks = []

    def loaded(compiled: Compiled | Walk, device: object) -> Kernel:
        tasks.append(compiled.task)
        return Kernel(library(compiled), late)

    stand_ins = {
        "_loaded": loaded,
        "_available": lambda device: True,
        "_shared_limit": lambda device: SHARED,
        "_multiprocessors": lambda device: MULTIPROCESSORS,
        "gpus": SimpleNamespace(of=lambda device: Gpu(90, True)),
    }
    launch._native.cache_clear()
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(driver, "tensor_map", tensor_map))
        stack.enter_context(patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()))
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch.object(launch, name, stand_in))
        try:
            yield tasks
        finally:
            launch._native.cache_clear()
