"""The CUDA driver as far as launches need it: kernels of a cubin, tensor maps, a launch on the current stream."""

import ctypes
import functools
import struct

import torch
from torch import Tensor

from ..context import bind_thread, checked, driver
from ..integers import cdiv

_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_UNSIGNED = {2: 1, 4: 2}  # CU_TENSOR_MAP_DATA_TYPE_UINT..., by bytes: copies do not look at what they move
_SWIZZLE = {16: 0, 32: 1, 64: 2, 128: 3}  # CU_TENSOR_MAP_SWIZZLE_..., by bytes of the pattern
_PROMOTION = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
_STRIDED = struct.Struct("<Qqqqq24x")  # as long as its alignment
_STRIDE = 16  # bytes, of which strides are multiples
_EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_MAY_BEGIN_EARLY = ctypes.pointer(_Attribute(id=_EARLY, value=1))


class Kernel:
    """A kernel of a cubin, on the current device.

    shared: bytes of shared memory that a block takes. early: launches may begin before the last one has ended, if that
    lets them, and wait for it themselves.
    """

    def __init__(self, cubin: bytes, name: str, threads: int, shared: int, early: bool) -> None:
        bind_thread()
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        checked(driver().cuModuleLoadData(ctypes.byref(module), cubin))
        checked(driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        checked(driver().cuFuncSetAttribute(function, _SHARED_SIZE, shared))
        self._function, self._block, self._shared = function, (threads, 1, 1), shared
        self._early = int(early)
        self._launch = driver().cuLaunchKernelEx

    def __call__(self, grid: tuple[int, int, int], arguments: bytes) -> None:
        """Launches with `arguments`, the kernel's one argument, a struct."""
        bind_thread()
        held = ctypes.create_string_buffer(arguments, cdiv(len(arguments), _MAP_ALIGNMENT) * _MAP_ALIGNMENT)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(held))
        stream = torch.cuda.current_stream().cuda_stream
        config = _Config(grid, self._block, self._shared, stream, _MAY_BEGIN_EARLY, self._early)
        checked(self._launch(ctypes.byref(config), self._function, pointers, None))


def tensor_map(axes: str, box: tuple[int, ...], pattern: int, x: Tensor) -> bytes:
    """Of heads [B, heads, H, W, D].

    axes: the order in which a copy has channels "c", columns "x" and rows "y", the first side by side in memory too;
    and heads "h", where channels are of one and not of all. box: how many of each. pattern: bytes that a copy is
    swizzled in, 16 is none.
    """
    return _tensor_map(x.data_ptr(), x.element_size(), x.shape, x.stride(), axes, box, pattern)


def strided_map(x: Tensor) -> bytes:
    """Of heads [B, heads, H, W, D] whose axis of channels goes on over heads: address, then steps.

    Of image, channel, row and column, as `basics.cuh` has them.
    """
    image, _, row, column, channel = x.stride()
    return _STRIDED.pack(x.data_ptr(), image, channel, row, column)


@functools.lru_cache(maxsize=1024)
def _tensor_map(
    address: int,
    element: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    axes: str,
    box: tuple[int, ...],
    pattern: int,
) -> bytes:
    bind_thread()  # a thread may describe maps first, for a kernel that another has loaded
    batch, heads, h, w, depth = shape
    channels = depth if "h" in axes else heads * depth
    of_axes = {"c": (channels, strides[4]), "x": (w, strides[3]), "y": (h, strides[2]), "h": (heads, strides[1])}
    sizes, steps = zip(*(of_axes[axis] for axis in axes), (batch, strides[0]), strict=True)
    # the stride of an axis of size 1 is never used, but has to be one
    steps = [step * element if size > 1 else _STRIDE for step, size in zip(steps[1:], sizes[1:], strict=True)]
    room = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
    start = -ctypes.addressof(room) % _MAP_ALIGNMENT
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(room) + start),
        _UNSIGNED[element],
        len(sizes),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * len(sizes))(*sizes),
        (ctypes.c_uint64 * len(steps))(*steps),
        (ctypes.c_uint32 * len(sizes))(*box, 1),
        (ctypes.c_uint32 * len(sizes))(*[1] * len(sizes)),
        0,
        _SWIZZLE[pattern],
        _PROMOTION,
        0,
    )
    checked(status)
    return room.raw[start : start + _MAP_BYTES]
