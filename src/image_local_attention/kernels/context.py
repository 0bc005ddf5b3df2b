"""The CUDA driver, and the context that its calls need in every thread."""

import ctypes
import functools
import threading

import torch

_thread = threading.local()


def bind_thread() -> None:
    """Gives a thread that has used no GPU yet the context of the current device, as torch would at its first kernel.

    Autograd runs a backward pass in a thread of its own, and Triton makes descriptors before it asks for a context.
    """
    if getattr(_thread, "bound", False):
        return
    context, device = ctypes.c_void_p(), torch.cuda.current_device()
    checked(driver().cuCtxGetCurrent(ctypes.byref(context)))
    if not context:
        checked(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        checked(driver().cuCtxSetCurrent(context))
    _thread.bound = True


@functools.cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def checked(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {text.value.decode() if text.value else status}")
