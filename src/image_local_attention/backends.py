"""Which backend computes an operator: one table, read when the operator runs.

A backend is a module with the functions `attention`, `attention_backward`, `similarity`, `aggregate`,
`aggregate_transpose` and `bias_gradient` over heads `[B, heads, H, W, D]`; its results lie in
maps made by `maps.empty_heads`.
"""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

NAMES = ("triton", "tiled", "reference")
_MODULES = {"triton": ".kernels", "tiled": ".tiled", "reference": ".reference"}

# Most channels per head, by dtype: a wider tile does not fit registers.
TRITON_MAX_DEPTH = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}
TRITON_MIN_CAPABILITY = (8, 0)  # NVIDIA; bf16 and asynchronous copies begin there


def resolve(backend: str | None, device: torch.device, dtype: torch.dtype, depth: int) -> ModuleType:
    """The module to run for maps of a device, dtype and (largest) number of channels per head.

    None as the backend takes triton where it can run and tiled everywhere else. Raises ValueError where a demanded
    backend cannot run, with the reason.
    """
    if backend in (None, "triton"):
        obstacle = triton_obstacle(device, dtype, depth)
        if backend is None:
            backend = "tiled" if obstacle or device.type == "cpu" else "triton"
        elif obstacle:
            raise ValueError(f"backend='triton' cannot run here: {obstacle}")
    return importlib.import_module(_MODULES[backend], __package__)


def triton_obstacle(device: torch.device, dtype: torch.dtype, depth: int) -> str | None:
    """Why the triton backend cannot run, or None where it can."""
    if dtype not in TRITON_MAX_DEPTH:
        return f"the maps are {dtype}, wanted one of {', '.join(map(str, TRITON_MAX_DEPTH))}"
    if depth > TRITON_MAX_DEPTH[dtype]:
        return f"a head has {depth} channels, wanted at most {TRITON_MAX_DEPTH[dtype]} in {dtype}"
    return _device_obstacle(device)


@functools.cache
def _device_obstacle(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "the maps are on the CPU, wanted a GPU, or TRITON_INTERPRET=1 in the environment"
    if device.type != "cuda":
        return f"the maps are on {device}, wanted a CUDA or ROCm device"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < TRITON_MIN_CAPABILITY:
        have = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"{device} has compute capability {have}, wanted at least 8.0"
    return None


def matmul_precision() -> str:
    """torch's precision of fp32 matrix products on a GPU, "ieee" or "tf32".

    A compiled graph keeps the setting it was traced with; torch recompiles it when the setting changes.
    """
    matmul = torch.backends.cuda.matmul
    if hasattr(torch.backends, "fp32_precision"):  # torch >= 2.9
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


# What torch.compiler.assume_constant_result sets; the decorator itself would import torch's compiler, for a second.
matmul_precision._dynamo_marked_constant = True
