"""Backends and devices that tests run on, poisoned memory, and how many random problems are tried.

A test that asks for `target` runs once per backend and device, one that asks for `dtype` too once per dtype of each.
What runs on CUDA is marked `gpu`. Triton runs on the CPU through its interpreter, unless there is a GPU.
"""

import functools
import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # a graph of yesterday does not answer for today's
# without what was tuned on this machine, so that launches take the plans of the table
os.environ["IMAGE_LOCAL_ATTENTION_CACHE"] = str(Path(__file__).parents[1] / "build" / "cache")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    importlib.import_module("interpreter").skip_idle_work()
torch.set_num_threads(1)  # the problems are small, and test processes share the cores

# `make test` tries the same few problems every time, `make hunt` thousands of new ones.
hypothesis.settings.register_profile("test", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile(
    "hunt", max_examples=int(os.environ.get("ILA_HUNT_EXAMPLES", "1000")), deadline=None, print_blob=True
)
hypothesis.settings.load_profile("test")


class Target(NamedTuple):
    """A backend on a device."""

    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and self.device == "cpu"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        if self.interpreted:  # its bf16 products are not those of a GPU
            return torch.float32, torch.float16
        half = torch.float32, torch.float16, torch.bfloat16
        return half if self.backend == "triton" else (torch.float64, *half)

    @property
    def obstacle(self) -> str | None:
        if self.device == "cuda" and not CUDA:
            return "no CUDA device"
        if self.backend == "triton" and importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if self.interpreted and os.environ.get("TRITON_INTERPRET") != "1":
            return "triton compiles for the GPU here; TRITON_INTERPRET=1 runs it on the CPU"
        return None

    def param(self, *more, name: str = ""):
        marks = [pytest.mark.gpu] if self.device == "cuda" else []
        if self.obstacle:
            marks.append(pytest.mark.skip(reason=self.obstacle))
        return pytest.param(self, *more, marks=marks, id=f"{self.backend}-{self.device}{name}")


TARGETS = [Target(backend, device) for device in ("cpu", "cuda") for backend in ("reference", "tiled", "triton")]


def pytest_generate_tests(metafunc):
    if any("target" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")):
        return  # the test chooses its own
    wanted = set(metafunc.fixturenames)
    if {"target", "dtype"} <= wanted:
        pairs = [(target, dtype) for target in TARGETS for dtype in target.dtypes]
        params = [target.param(dtype, name=f"-{str(dtype).removeprefix('torch.')}") for target, dtype in pairs]
        metafunc.parametrize(("target", "dtype"), params)
    elif "target" in wanted:
        metafunc.parametrize("target", [target.param() for target in TARGETS])


@pytest.fixture
def backend(target):
    return target.backend


@pytest.fixture
def device(target):
    return target.device


@pytest.fixture(autouse=True)
def exact_fp32():
    """fp32 products are exact, whatever a test before this one asked for."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def poison(monkeypatch):
    """Uninitialised memory holds NaN, or the largest integer: what is not written shows."""

    def poisoned(allocate):
        @functools.wraps(allocate)
        def call(*args, **kwargs):
            x = allocate(*args, **kwargs)
            with torch.no_grad():
                return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)

        return call

    for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
