"""The GPU a launch is for: how it copies blocks and which products it takes."""

import functools
from dataclasses import dataclass

import torch
import triton

from .integers import next_power_of_2

# How products are taken: of halves, of fp32 rounded to TF32, of fp32 exactly in three passes of TF32, or as it is.
PRODUCTS = ("half", "tf32", "three-pass", "exact")


@dataclass(frozen=True)
class Gpu:
    """What launches depend on: `arch` is 90 for sm_90, 0 under the interpreter, -1 elsewhere."""

    arch: int
    nvidia: bool

    @property
    def interpreted(self) -> bool:
        return self.arch == 0

    def way(self, layout: str, by_pointer: bool) -> str:
        """How to read a map of a layout; the interpreter stands for a GPU that copies through descriptors."""
        copies = self.interpreted or (self.nvidia and self.arch >= 90)
        if copies and not by_pointer:
            return layout
        return "columns" if layout == "planes" else "pointer"

    def product(self, dtype: torch.dtype, precision: str) -> str:
        """One of PRODUCTS: fp32 is exact unless TF32 was asked for."""
        if dtype != torch.float32:
            return "half"
        if precision == "tf32":
            return "tf32"
        return "three-pass" if self.nvidia else "exact"


@functools.cache
def of(device: torch.device) -> Gpu:
    if triton.knobs.runtime.interpret:
        return Gpu(arch=0, nvidia=False)
    with torch.cuda.device(device):
        target = triton.runtime.driver.active.get_current_target()
    nvidia = target.backend == "cuda"
    return Gpu(target.arch if nvidia else -1, nvidia)


@functools.cache
def padded(depth: int) -> int:
    """Channels that a tile holds for a depth: a power of two, at least 16 for the matrix units."""
    return max(16, next_power_of_2(depth))
