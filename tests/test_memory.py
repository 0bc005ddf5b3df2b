"""What memory the operators take: on a GPU by the allocator's counters, on a CPU by what their backends allocate.

The fused forward takes its output and one float per pixel and head, the backward its gradients and one float per
pixel and head; triton nothing else, tiled some strips of a map. No memory layout costs a copy of a map.
"""

import gc
import time
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import Target
from image_local_attention import backends, local_aggregate, local_attention, local_similarity
from problems import LAYOUTS, lay_out

HEADS, KERNEL = 2, (3, 5)
BACKEND_FUNCTIONS = (
    "attention",
    "attention_backward",
    "similarity",
    "aggregate",
    "aggregate_transpose",
    "bias_gradient",
)


class Allocations(TorchDispatchMode):
    """Sizes in bytes of the storages that operations bring into being, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[tuple[StorageWeakRef, int]] = []
        self.sizes: list[int] = []
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self._count(x.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.sizes.append(storage.nbytes())
        self.alive = [(ref, n) for ref, n in self.alive if not ref.expired()]
        self.alive.append((StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(n for _, n in self.alive))

    def at_least(self, size: int) -> list[int]:
        return sorted(n for n in self.sizes if n >= size)


@pytest.fixture
def allocations(monkeypatch):
    """Counts what the functions of the backend allocate, and nothing of what is around them."""
    counter, resolve = Allocations(), backends.resolve

    def counted(function):
        def call(*args):
            with counter:
                return function(*args)

        return call

    def resolve_counted(*args):
        module = resolve(*args)
        return SimpleNamespace(
            **{name: counted(getattr(module, name)) for name in BACKEND_FUNCTIONS if hasattr(module, name)}
        )

    monkeypatch.setattr(backends, "resolve", resolve_counted)
    return counter


def maps(layout: str, target: Target, size: tuple[int, ...]) -> list[torch.Tensor]:
    """Query, key, value and gradient, one layout for all."""
    generator = torch.Generator().manual_seed(0)
    x = [lay_out(torch.randn(size, generator=generator).to(target.device), layout) for _ in range(4)]
    return [*(x.requires_grad_() for x in x[:3]), x[3]]


def nbytes(*tensors: torch.Tensor) -> list[int]:
    return sorted(x.nbytes for x in tensors)


def cases(*backends: str, device: str):
    """Backends, each with the size of a map and of the smallest allocation that is counted."""
    # The interpreter's own numbers are small; a strip and the scores of tiled are less than half of this map.
    worlds = {"triton": ((2, 8, 6, 7), 256), "tiled": ((1, 16, 320, 320), 320 * 320 * 16 * 4 // 2)}
    return [Target(backend, device).param(*worlds[backend]) for backend in backends]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("target", "size", "counted"), cases("triton", "tiled", device="cpu"))
def test_fused_backends_allocate_results_only(target, size, counted, layout, allocations):
    q, k, v, grad = maps(layout, target, size)
    out, lse = local_attention(q, k, v, KERNEL, heads=HEADS, return_lse=True, backend=target.backend)
    assert allocations.at_least(counted) == [n for n in nbytes(out, lse) if n >= counted]
    allocations.sizes.clear()
    grads = torch.autograd.grad(out, (q, k, v), grad)
    assert allocations.at_least(counted) == [n for n in nbytes(*grads, lse) if n >= counted]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("target", "size", "counted"), cases("triton", "tiled", device="cpu"))
def test_unfused_backends_allocate_results_only(target, size, counted, layout, allocations):
    q, k, v, grad = maps(layout, target, size)
    weight = local_similarity(q, k, KERNEL, heads=HEADS, backend=target.backend)
    out = local_aggregate(weight, v, KERNEL, heads=HEADS, backend=target.backend)
    assert allocations.at_least(counted) == nbytes(weight, out)
    allocations.sizes.clear()
    grads = torch.autograd.grad(out, (q, k, v), grad)
    assert allocations.at_least(counted) == nbytes(*grads, weight)


GENERAL = {  # options, and how many key pixels there are to a query pixel on each axis
    "grouped heads": ({"kv_heads": 2}, (1, 1)),
    "finer keys": ({"border": "mask"}, (1, 2)),
    "coarser keys, grouped heads": ({"kv_heads": 2, "border": "shift"}, (1, 0.5)),
    "dilation": ({"border": ("circular", "zeros"), "dilation": (1, 3)}, (1, 1)),
    "key mask": ({"border": "reflect", "masked": True}, (1, 1)),
    "raster": ({"border": "mask", "causal": "raster"}, (1, 1)),
}


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("case", GENERAL.values(), ids=GENERAL)
def test_general_windows_of_tiled_copy_no_map(case, layout, allocations):
    """Of what is as large as three quarters of the smallest map there are the results only."""
    options, ratio = case
    options = {"heads": 4, "backend": "tiled"} | options
    heads, kv_heads, side = 4, options.get("kv_heads", 4), 240
    size = [round(side * r) for r in ratio]
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 16 * heads, side, side), *[(1, 16 * kv_heads, *size)] * 2, (1, 16 * heads, side, side)
    q, k, v, grad = (lay_out(torch.randn(shape, generator=generator), layout) for shape in shapes)
    there = torch.ones(1, *size, dtype=torch.bool) if options.pop("masked", False) else None
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    counted = min(x.numel() for x in (q, k)) * 4 * 3 // 4  # more than the scores, 2 MiB
    out, lse = local_attention(q, k, v, KERNEL, return_lse=True, key_mask=there, **options)
    assert allocations.at_least(counted) == [n for n in nbytes(out, lse) if n >= counted]
    allocations.sizes.clear()
    grads = torch.autograd.grad(out, (q, k, v), grad)
    assert allocations.at_least(counted) == [n for n in nbytes(*grads, lse) if n >= counted]


@pytest.mark.parametrize("kernel", [3, 9, 21])
def test_tiled_takes_strips_whatever_the_window(kernel, allocations):
    """Ten strips of a map, up to 32 pixels and a window wide, and a few buffers of 2 MiB."""
    channels, side = 8, 256
    q, k, v, grad = maps("contiguous", Target("tiled", "cpu"), (1, channels, side, side))
    strips = 10 * channels * (side + 32 + kernel) * (32 + kernel) * 4 + 8 * 2**20
    out, lse = local_attention(q, k, v, kernel, return_lse=True, backend="tiled")
    assert allocations.peak <= sum(nbytes(out, lse)) + strips
    grads = torch.autograd.grad(out, (q, k, v), grad)
    assert allocations.peak <= sum(nbytes(out, lse, *grads)) + strips


def test_the_count_sees_a_copy(allocations):
    x = torch.randn(4, 6).t()
    with allocations:
        y = x.contiguous()
        x.view(6, 4).add_(1)
        del y
        z = x * 2
    assert allocations.sizes == [z.nbytes, z.nbytes]
    assert allocations.peak == z.nbytes


class Peak:
    """Bytes that the CUDA allocator handed out at most beyond what it had, as they were asked for."""

    def __enter__(self):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        return self

    def __exit__(self, *error):
        torch.cuda.synchronize()
        self.bytes = torch.cuda.memory_stats()["requested_bytes.all.peak"] - self.before


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", [Target("triton", "cuda").param()])
def test_fused_on_a_gpu(target, layout):
    def forward():
        return local_attention(q, k, v, KERNEL, heads=HEADS, return_lse=True, backend="triton")

    q, k, v, grad = maps(layout, target, (2, 64, 96, 80))
    torch.autograd.grad(forward()[0], (q, k, v), grad)  # compiles
    with Peak() as peak:
        out, lse = forward()
    assert peak.bytes <= sum(nbytes(out, lse))
    with Peak() as peak:
        grads = torch.autograd.grad(out, (q, k, v), grad)
    assert peak.bytes <= sum(nbytes(*grads, lse))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", [Target("triton", "cuda").param()])
def test_unfused_on_a_gpu(target, layout):
    def similarity():
        return local_similarity(q, k, KERNEL, heads=HEADS, backend="triton")

    q, k, v, grad = maps(layout, target, (2, 64, 96, 80))
    weight = similarity().detach().requires_grad_()
    grad_weight = torch.ones_like(weight)

    def aggregate():
        return local_aggregate(weight, v, KERNEL, heads=HEADS, backend="triton")

    torch.autograd.grad(similarity(), (q, k), grad_weight)  # compiles
    torch.autograd.grad(aggregate(), (weight, v), grad)
    for forward, inputs, upstream in ((similarity, (q, k), grad_weight), (aggregate, (weight, v), grad)):
        with Peak() as peak:
            result = forward()
        assert peak.bytes <= sum(nbytes(result))
        with Peak() as peak:
            grads = torch.autograd.grad(result, inputs, upstream)
        assert peak.bytes <= sum(nbytes(*grads))


def tensors_alive() -> int:
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


@pytest.mark.parametrize("border", ["mask", "shift"])
def test_nothing_waits_for_the_garbage_collector(target, border):
    """A cycle of references would keep maps of one step of a training until the collector comes by."""
    q, k, v = (torch.randn(1, 4, 6, 7, device=target.device, requires_grad=True) for _ in range(3))

    def step():
        out = local_attention(q, k, v, 3, heads=2, border=border, backend=target.backend)
        weight = local_similarity(q, k, 3, heads=2, border=border, backend=target.backend).softmax(-1)
        out = out + local_aggregate(weight, v, 3, heads=2, border=border, backend=target.backend)
        torch.autograd.grad(out.sum(), (q, k, v))

    step()  # fills caches
    gc.collect()
    gc.disable()
    try:
        before = tensors_alive()
        for _ in range(3):
            step()
        deadline = time.monotonic() + 5  # the thread of a device lets go of its last step in its own time
        while tensors_alive() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert tensors_alive() <= before
    finally:
        gc.enable()
