"""The native kernels on a GPU: every plan and random problems, each within its budget."""

import functools
import threading
from contextlib import nullcontext

import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from budget import assert_within
from conftest import CUDA, Target
from image_local_attention import local_aggregate, local_attention, local_similarity
from image_local_attention.bench.timing import matmul_precision
from image_local_attention.kernels import native
from image_local_attention.kernels.native import launch, plan, table, walk_table
from image_local_attention.kernels.native.walk import WalkPlan
from problems import EVERY_GRADIENT, GRADIENTS, Problem, for_each
from test_accuracy import AGGREGATE, ATTENTION, SIMILARITY, asked, check, exact_results, numbers, run, wide
from test_native import heads_for, noting, row_name
from walked import FUSED, WALKED, walked_name, walking

FP32 = torch.float32
HALVES = torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP32], ids=["bf16", "fp16", "fp32"])
WIDEST = {16: 21, 32: 13, 64: 21}  # windows of halves that some task serves, by channels per head; of fp32, 21

TRITON = Target("triton", "cuda")
UNFUSED = set(plan.UNFUSED)


def operator_of(task: str):
    """One that runs it in its forward or backward."""
    return {"similarity": SIMILARITY, "aggregate_transpose": SIMILARITY, "aggregate": AGGREGATE}.get(task, ATTENTION)


@pytest.fixture
def served(monkeypatch):
    """The tasks that native kernels are launched for."""
    tasks = []
    monkeypatch.setattr(native, "native", noting(tasks))
    return tasks


BANDS = [job for job in table.rows() if job[2].plan.band]
WALKS = [
    (task, plan.Form("half", planes), table.Row(room - 2 * row.padded, row.kernel, row.plan))
    for (task, planes, room), rows in walk_table.table()
    for row in rows
]


def walk_name(job) -> str:
    task, form, row = job
    held = f"{row.plan.tile[0]}x{row.plan.tile[1]}x{row.plan.abreast}x{row.plan.slots}"
    held += f"-chunk{row.plan.chunk}" if row.plan.chunk else ""
    return f"walk-{task}-{'planes' if form.planes else 'rows'}-{row.depth}-k{row.kernel}-{held}"


PLAN_NAMES = [*map(row_name, table.rows()), *map(walk_name, WALKS)]


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize(("task", "form", "row"), table.rows() + WALKS, ids=PLAN_NAMES)
@pytest.mark.usefixtures("poison")
def test_every_plan_is_within_its_budget(task, form, row, served):
    """On a map of several tiles each way and a remainder, and on two images and two groups of heads."""
    heads = 1 if isinstance(row.plan, WalkPlan) else heads_for(task, form, row)
    kernel = min(row.kernel, 60)  # wider ones have more chunks of the same
    size, layouts = ((11, 24), ("contiguous",) * 4) if form.planes else ((11, 19), ("channels_last",) * 4)
    dtypes = (torch.bfloat16, torch.float16) if form.product == "half" else (FP32,)
    judge = check_tf32 if form.product == "tf32" else check
    with native.using(task, row.plan):
        for seed, sides in enumerate([(kernel, min(kernel, 9)), (2, kernel), (kernel, 3)]):
            each = problem(heads, row.depth, size, sides, layouts=layouts, seed=seed)
            judge(operator_of(task), each, TRITON, dtypes[seed > 0 and len(dtypes) > 1])
        for dtype in dtypes:
            each = problem(2 * heads, row.depth, (5, 8), (3, 3), batch=2, layouts=layouts)
            judge(operator_of(task), each, TRITON, dtype)
    assert task in served


class Tf32(TorchDispatchMode):
    """Products in fp64 of factors cut off after 11 bits, as matrix units take them in TF32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "mul" and all(isinstance(x, torch.Tensor) and x.dim() for x in args):
            args = [x.float().view(torch.int32).bitwise_and(-0x2000).view(FP32).double() for x in args]
        return func(*args, **(kwargs or {}))


def check_tf32(operator, problem: Problem, target, dtype) -> None:
    """Results and gradients are within twice the error of plain code whose products are those of TF32."""
    inputs, upstream = numbers(operator, problem, dtype, target.device)
    options = asked(operator, problem, target.device)
    names, more = list(inputs), {"kernel_size": problem.kernel, "backend": target.backend}
    if operator is not AGGREGATE:
        more["scale"] = problem.scale
    with matmul_precision("tf32"):
        got = run(functools.partial(operator.ours, **options | more), operator, inputs, upstream, names)
    usual = functools.partial(operator.plain, kernel=problem.kernel, **asked(operator, problem, "cpu"))
    in_fp64 = {name: wide(x) for name, x in inputs.items()}
    with Tf32():
        rounded = run(usual, operator, in_fp64, [g if g is None else wide(g) for g in upstream], names)
    exact = exact_results(operator, inputs, upstream, problem)
    for name, x in got.items():
        assert_within(name, x, [rounded[name]], exact[name], torch.finfo(dtype).eps)


def problem(heads, depth, size, kernel, **more) -> Problem:
    usual = {
        "batch": 1,
        "border": ("zeros", "zeros"),
        "scale": None,
        "layouts": ("channels_last",) * 4,
        "wanted": EVERY_GRADIENT,
        "used": "both",
        "spread": 1.0,
        "magnitude": 1.0,
        "seed": 0,
        "weight_layout": "contiguous",
    }
    shapes = {"heads": heads, "key_depth": depth, "value_depth": depth, "size": size, "kernel": kernel}
    return Problem(**usual | shapes | more)


OPERATORS = pytest.mark.parametrize(
    ("operator", "tasks"),
    [(ATTENTION, FUSED), (SIMILARITY, UNFUSED), (AGGREGATE, UNFUSED)],
    ids=["attention", "similarity", "aggregate"],
)


@st.composite
def served_problems(draw, dtype, depths=tuple(WIDEST), ways=(False, True), widest=None):
    """ways: whether maps are planes. widest: vectors of a row of these, at most."""
    depth = draw(st.sampled_from(sorted(depths)))
    sides = st.integers(1, 21 if dtype == FP32 else WIDEST.get(depth, 21))
    kernel = draw(st.one_of(sides.map(lambda k: (k, k)), st.tuples(sides, sides)))
    planes, vectors = draw(st.sampled_from(ways)), st.integers(1, widest or (6 if dtype == FP32 else 3))
    return problem(
        draw(st.integers(1, max(1, 64 // depth))),
        depth,
        (draw(st.integers(1, 17)), 16 // dtype.itemsize * draw(vectors) if planes else draw(st.integers(1, 17))),
        kernel,
        layouts=("contiguous" if planes else "channels_last",) * 4,
        batch=draw(st.integers(1, 2)),
        causal=draw(st.sampled_from((False, False, True, (False, True)))),
        scale=draw(st.sampled_from((None, 1.0, 0.3, -0.7))),
        wanted=draw(st.sampled_from(GRADIENTS)),
        used=draw(st.sampled_from(("both", "out", "lse"))),
        spread=draw(st.sampled_from((1.0, 0.3, 4.0))),
        magnitude=draw(st.sampled_from((1.0, 0.1, 8.0))),
        seed=draw(st.integers(0, 2**32)),
    )


@pytest.mark.gpu
@pytest.mark.hunt
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@DTYPES
@OPERATORS
@pytest.mark.usefixtures("poison")
def test_random_problems(operator, tasks, dtype, served):
    name = f"native {operator.inputs} {dtype}"
    for_each(served_problems(dtype), 20, name, lambda each: check(operator, each, TRITON, dtype))
    assert set(served) == tasks


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@DTYPES
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_weights_of_keys_outside_of_the_map_are_not_read(layout, dtype, served):
    check_infinite_weights_outside(layout, dtype, TRITON)
    assert set(served) == {"aggregate", "aggregate_transpose"}


def check_infinite_weights_outside(layout, dtype, target) -> None:
    """Sums and gradients of the value are those of weights that are zero there."""
    _, _, value, grad = problem(1, 16, (9, 16), (5, 5), layouts=(layout,) * 4).maps(dtype, target.device)
    weight = torch.randn(1, 1, 9, 16, 25, generator=torch.Generator().manual_seed(0)).to(target.device, dtype)
    y, x = (torch.arange(size)[:, None] + torch.arange(-2, 3) for size in (9, 16))
    there = ((y >= 0) & (y < 9))[:, None, :, None] & ((x >= 0) & (x < 16))[:, None, :]
    there = there.reshape(9, 16, 25).to(target.device)
    results = []
    for other in 0.0, float("inf"):
        leaf = value.detach().requires_grad_()
        out = local_aggregate(weight.masked_fill(~there, other), leaf, 5, backend=target.backend)
        results.append((out.detach(), *torch.autograd.grad(out, leaf, grad)))
    for x, wanted in zip(*results, strict=True):
        assert x.isfinite().all()
        assert torch.equal(x, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("job", BANDS + WALKS, ids=[*map(row_name, BANDS), *map(walk_name, WALKS)])
def test_bands_are_read_before_others_take_their_place(job, served):
    """Bands of a map with many tiles: results are the same every time, and those of portable kernels."""
    task, form, row = job
    dtype = torch.bfloat16 if form.product == "half" else FP32
    tolerance = {"half": 3e-2, "tf32": 5e-3, "three-pass": 1e-5}[form.product]
    maps = [torch.randn(1, row.depth, 256, 256, device="cuda", dtype=dtype) for _ in range(4)]
    if not form.planes:
        maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    leaves = [x.requires_grad_() for x in maps[:3]]

    def results():
        if task in UNFUSED:
            out = local_similarity(*leaves[:2], row.kernel)
            weighted = local_aggregate(out, leaves[2], row.kernel)
            grads = torch.autograd.grad(weighted, leaves, maps[3])
            return out.detach(), weighted.detach(), *grads
        out = local_attention(*leaves, row.kernel)
        return out.detach(), *torch.autograd.grad(out, leaves, maps[3])

    with matmul_precision("tf32" if form.product == "tf32" else "ieee"):
        with native.portable():
            wanted = results()
        with native.using(task, row.plan):
            first, *others = (results() for _ in range(8))
    assert task in served
    for x, want in zip(first, wanted, strict=True):
        assert (x - want).abs().max() <= tolerance * want.abs().max()
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.usefixtures("poison")
def test_large_logits_and_small_scales():
    """Weights that are all but one key's, and scales that maps make up for."""
    for scale, spread in ((None, 100.0), (1e-6, 1.0), (2.0**50, 30.0)):
        check(ATTENTION, problem(2, 32, (9, 17), (5, 5), scale=scale, spread=spread), TRITON, torch.bfloat16)
        check(ATTENTION, problem(2, 32, (9, 17), (5, 5), scale=scale, spread=spread), TRITON, FP32)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@DTYPES
def test_results_are_the_same_every_time_and_in_a_graph(dtype):
    maps = [torch.randn(2, 64, 33, 47, device="cuda", dtype=dtype) for _ in range(3)]
    maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]

    def results():
        leaves = [x.detach().requires_grad_() for x in maps]  # autograd binds a leaf to the stream that first used it
        out = local_attention(*leaves, 7, heads=2)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    def differing(others):
        return [i for i, (x, y) in enumerate(zip(first, others, strict=True)) if not torch.equal(x, y)]

    first = results()
    for _ in range(3):
        assert differing(results()) == []
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert differing(results()) == []
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = results()
    graph.replay()
    assert differing(captured) == []


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("scale", [0.3, -0.7])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float16, FP32], ids=["fp16", "fp32"])
@pytest.mark.usefixtures("poison")
def test_signs_of_the_scale(scale, layout, dtype, served):
    layouts = (layout,) * 4
    check(ATTENTION, problem(2, 32, (9, 16), (5, 6), scale=scale, layouts=layouts), TRITON, dtype)
    assert set(served) == FUSED


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_the_first_that_a_thread_does_on_a_gpu():
    """As in the thread in which autograd runs a backward pass."""
    maps = [torch.randn(1, 16, 9, 9, device="cuda", dtype=torch.float16) for _ in range(3)]
    maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    results = []
    for given in maps, [x.clone() for x in maps]:  # the second: of a kernel that another thread has loaded
        thread = threading.Thread(target=lambda maps=given: results.append(local_attention(*maps, 3)))
        thread.start()
        thread.join()
    assert all(torch.equal(x, local_attention(*maps, 3)) for x in results)
    assert len(results) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_the_first_that_a_thread_does_on_a_gpu_in_triton():
    """Whose descriptors are made before it asks for a context."""
    maps = [torch.randn(1, 16, 9, 9, device="cuda").contiguous(memory_format=torch.channels_last) for _ in range(2)]
    results = []
    with native.portable():
        wanted = local_similarity(*maps, 3)
        thread = threading.Thread(target=lambda: results.append(local_similarity(*maps, 3)))
        thread.start()
        thread.join()
    assert torch.equal(results[0], wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP32], ids=["bf16", "fp32"])
def test_maps_past_two_to_the_31_elements(dtype):
    """One head of 64 channels: the last rows are those of the same map cut off there."""
    size = 6000
    maps = [torch.randn(1, 64, size, size, device="cuda", dtype=dtype) for _ in range(3)]
    maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    out = local_attention(*maps, 5)[:, :, -20:]
    with native.portable():
        cut = local_attention(*(x[:, :, -40:].contiguous(memory_format=torch.channels_last) for x in maps), 5)
    tolerance = 1e-5 if dtype == FP32 else 2e-2
    torch.testing.assert_close(out, cut[:, :, -20:], rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("walked", WALKED, ids=walked_name)
@pytest.mark.usefixtures("poison")
def test_blocks_that_walk_are_within_their_budgets(walked, served, monkeypatch):
    """With few tiles to a block, and, as if there were few multiprocessors, with many."""
    planes, depth, kernel, held = walked
    layouts = ("contiguous" if planes else "channels_last",) * 4
    for multiprocessors, size, heads, dtype in (132, (11, 24), 2, torch.float16), (2, (27, 56), 1, torch.bfloat16):
        monkeypatch.setattr(launch, "_multiprocessors", lambda device, count=multiprocessors: count)
        launch._native.cache_clear()
        with walking(held):
            check(ATTENTION, problem(heads, depth, size, kernel, batch=heads, layouts=layouts), TRITON, dtype)
    launch._native.cache_clear()
    assert set(served) >= FUSED


@pytest.mark.gpu
@pytest.mark.hunt
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("planes", [False, True], ids=["rows", "planes"])
@pytest.mark.usefixtures("poison")
def test_random_problems_of_blocks_that_walk(planes, dtype, served):
    """Over planes with plans of the table; over rows with one that has room for every window."""
    depths, widest = ((9, 16, 30, 32, 45, 64, 100, 128), 14) if planes else ((64, 128), None)
    problems = served_problems(dtype, depths=depths, ways=(planes,), widest=widest)
    with nullcontext() if planes else walking(WalkPlan((8, 8), 2, 2, 3)):
        for_each(problems, 40, f"walk {planes} {dtype}", lambda each: check(ATTENTION, each, TRITON, dtype))
    assert set(served) >= FUSED
