"""How a kernel reads a map: through a tensor descriptor where strides allow it, else through pointers."""

import functools
from dataclasses import dataclass

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .gpu import padded

ALIGNMENT = 16  # bytes, of a descriptor's base and strides and of where a copy begins
_SECTOR = 32  # bytes that memory moves at once

# The order of axes that a descriptor sees, the innermost last, out of (batch, head, y, x, channel).
_ORDERS = {"rows": (0, 2, 3, 1, 4), "planes": (0, 1, 4, 2, 3)}


@dataclass(frozen=True)
class Source:
    """What a kernel is handed for a map [B, heads, H, W, D]: `handle`, `strides`, and the `way` to read it.

    "rows" and "planes" are descriptors with channels or columns innermost, "columns" are pointers to columns that
    lie side by side and blocks that begin on whole vectors, "pointer" is the way that takes any strides.
    """

    handle: Tensor | TensorDescriptor
    strides: tuple[int, ...]
    way: str


def layout_of(x: Tensor) -> str:
    """Which way's descriptor the map's strides and address allow, "rows" or "planes", else "pointer"."""
    return "pointer" if x.data_ptr() % ALIGNMENT else _layout(x.shape, x.stride(), x.element_size())


# Every call of a model asks for the same few, here and below.
@functools.lru_cache(maxsize=4096)
def _layout(*geometry: object) -> str:
    return next((way for way in _ORDERS if descriptor_strides(way, *geometry) is not None), "pointer")


def source(x: Tensor, block: tuple[int, int], way: str) -> Source:
    """The source of a map for blocks of (rows, columns) pixels."""
    if way not in _ORDERS:
        return Source(x, x.stride(), way)
    shape, steps, box = _described(way, block, x.shape, x.stride(), x.element_size())
    return Source(TensorDescriptor(x, list(shape), list(steps), list(box)), x.stride(), way)


@functools.lru_cache(maxsize=4096)
def _described(
    way: str, block: tuple[int, int], shape: tuple[int, ...], strides: tuple[int, ...], element_size: int
) -> tuple[tuple[int, ...], ...]:
    """Shape, strides and block of a map's descriptor, in a way's order."""
    order = _ORDERS[way]
    box = 1, 1, *block, padded(shape[4])
    steps = descriptor_strides(way, shape, strides, element_size)
    return tuple(shape[axis] for axis in order), steps, tuple(box[axis] for axis in order)


def column_step(element_size: int, way: str, tile_width: int) -> int:
    """Pixels of which a block's first column must be a multiple: whole vectors, whole sectors for wide tiles."""
    if way not in ("planes", "columns"):
        return 1
    return max(ALIGNMENT // element_size, min(_SECTOR // element_size, tile_width))


@functools.lru_cache(maxsize=4096)
def descriptor_strides(
    way: str, shape: tuple[int, ...], strides: tuple[int, ...], element_size: int
) -> tuple[int, ...] | None:
    """Strides in a way's order if a descriptor takes them: innermost 1, all others multiples of 16 bytes."""
    step = ALIGNMENT // element_size
    *outer, inner = _ORDERS[way]
    # The stride of an axis of size 1 is never used, whatever torch says it is.
    steps = [strides[axis] if shape[axis] > 1 else step for axis in outer]
    if strides[inner] != 1 and shape[inner] > 1:
        return None
    if any(stride % step or stride <= 0 for stride in steps):
        return None
    return *steps, 1
