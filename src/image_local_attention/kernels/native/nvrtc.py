"""CUDA C++ to machine code at run time, by the NVRTC that torch brings along; results are kept on disk."""

import contextlib
import ctypes
import functools
import glob
import hashlib
import os
import sys
from pathlib import Path

import torch

from .. import cache

_MAGIC = b"\x7fELF"  # with which machine code begins


class CompileError(RuntimeError):
    """What NVRTC says of a source that it does not take."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """NVRTC of torch's CUDA version; None where it is not installed."""
    return None if torch.version.cuda is None else find(torch.version.cuda.split(".")[0])


def find(major: str) -> ctypes.CDLL | None:
    """NVRTC of a major version of CUDA: from a wheel beside torch, else where the system's loader looks."""
    name = f"libnvrtc.so.{major}"
    beside = (path for entry in sys.path for path in glob.glob(os.path.join(entry, "nvidia", "*", "lib", name)))
    for path in (*beside, name):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(path)
    return None


def architectures() -> frozenset[int]:
    """The GPUs that NVRTC compiles for, 90 for sm_90."""
    nvrtc, count = library(), ctypes.c_int()
    _checked(nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    found = (ctypes.c_int * count.value)()
    _checked(nvrtc.nvrtcGetSupportedArchs(found))
    return frozenset(found)


def compiled(source: str, options: tuple[str, ...]) -> bytes:
    """Machine code (a cubin) of `source`; from disk where it was compiled before and can be read.

    A folder that cannot be written is no error.
    """
    path = _kept(source, options)
    if path is not None:
        with contextlib.suppress(OSError):
            binary = path.read_bytes()
            if binary.startswith(_MAGIC):
                return binary
    binary, _ = build(source, options)
    if path is not None:
        with contextlib.suppress(OSError):
            cache.write(path, binary)
    return binary


def _kept(source: str, options: tuple[str, ...]) -> Path | None:
    where = cache.folder()
    if where is None:
        return None
    key = hashlib.sha256("\0".join((source, *options, _version())).encode()).hexdigest()
    return where / f"{key[:32]}.cubin"


@functools.cache
def _version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def build(source: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """Machine code of `source`, and what the compiler says of it."""
    nvrtc, program = library(), ctypes.c_void_p()
    _checked(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"attention.cu", 0, None, None))
    try:
        given = [option.encode() for option in options]
        failed = nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
        log = _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).rstrip(b"\0").decode()
        if failed:
            raise CompileError(f"NVRTC {_version()} does not compile with {options}:\n{log}")
        return _text(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(program: ctypes.c_void_p, size_of, content_of) -> bytes:
    size = ctypes.c_size_t()
    _checked(size_of(program, ctypes.byref(size)))
    content = ctypes.create_string_buffer(size.value)
    _checked(content_of(program, content))
    return content.raw


def _checked(status: int) -> None:
    if status:
        raise CompileError(f"NVRTC {_version()} answers {status}")
