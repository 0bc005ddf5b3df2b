"""The native kernels: what they serve, what they are compiled to, and, on a GPU, every plan and random problems."""

import itertools
import re
import struct
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
import torch
import triton
from hypothesis import strategies as st

from conftest import CUDA, Target
from image_local_attention import local_attention
from image_local_attention.kernels import launch as launches
from image_local_attention.kernels import native
from image_local_attention.kernels.native import launch, nvrtc, plan
from image_local_attention.maps import empty_heads, split_heads
from image_local_attention.rules import Rules
from image_local_attention.window import Window
from problems import EVERY_GRADIENT, GRADIENTS, Problem, for_each
from test_accuracy import ATTENTION, check

NVRTC = nvrtc.find(torch.version.cuda.split(".")[0] if torch.version.cuda else "13")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED = 227 * 1024
WIDEST = {16: 21, 32: 13, 64: 11}  # served by some task, by channels per head
HALVES = torch.bfloat16, torch.float16

needs_nvrtc = pytest.mark.skipif(NVRTC is None, reason="NVRTC is not installed")


def heads_for(planes: bool, row: plan.Row) -> int:
    """The most heads that share a block of this plan."""
    most = 1 if planes else max(1, row.plan.pixel_bytes // (2 * row.depth))
    return next(
        heads
        for heads in (4, 2, 1)
        if heads <= most and plan.suits(row.plan, row.plan.group(heads, row.depth, planes), planes)
    )


def compiled_for(task, planes: bool, row: plan.Row, kernel: tuple[int, int], dtype=torch.bfloat16) -> launch.Compiled:
    group = row.plan.group(heads_for(planes, row), row.depth, planes)
    lead = kernel[0] // 2, kernel[1] // 2
    return launch.Compiled(task, row.plan, planes, dtype, row.depth, group, kernel, lead)


def row_name(job) -> str:
    task, planes, row = job
    layout, heads = "planes" if planes else "rows", heads_for(planes, row)
    size = "small-" if row.pixels < 2**20 else ""
    return f"{task}-{size}{layout}-{heads}x{row.depth}-k{row.kernel}-{row.plan.tile[0]}x{row.plan.tile[1]}"


EVERY_ROW = pytest.mark.parametrize(("task", "planes", "row"), plan.rows(), ids=map(row_name, plan.rows()))


@needs_nvrtc
@EVERY_ROW
def test_every_plan_compiles_and_keeps_its_registers(task, planes, row, monkeypatch):
    """A few words may be spilled where more blocks share a multiprocessor for it."""
    monkeypatch.setattr(nvrtc, "library", lambda: NVRTC)
    compiled = compiled_for(task, planes, row, (row.kernel, row.kernel))
    assert compiled.shared <= SHARED
    for arch in (90, 100, 120):
        source = compiled.source + agreement(compiled)
        cubin = nvrtc._compile(source, (f"--gpu-architecture=sm_{arch}", *compiled.options))
        assert cubin
        if arch == 90:  # where plans were measured
            assert resources(cubin)["STACK"] <= 64


@needs_nvrtc
def test_windows_of_any_sides_compile(monkeypatch):
    monkeypatch.setattr(nvrtc, "library", lambda: NVRTC)
    tasks = ("forward", 16), ("grad_key_value", 32)
    for (task, depth), planes, kernel in itertools.product(tasks, (False, True), [(1, 2), (4, 7), (9, 2)]):
        rows = (row for *of, row in plan.rows() if of == [task, planes] and row.depth == depth)
        row = next(row for row in rows if max(kernel) <= row.kernel)
        compiled = compiled_for(task, planes, row, kernel, torch.float16)
        source = compiled.source + agreement(compiled)
        assert nvrtc._compile(source, ("--gpu-architecture=sm_90", *compiled.options))


def agreement(compiled: launch.Compiled) -> str:
    """Source that does not compile unless `tile.cuh` counts as `plan` does, and arguments end where `launch` says."""
    (sub_h, sub_w), (seen_h, seen_w), (halo_h, halo_w), _ = held = compiled.shape
    tiles = {"forward": 1, "grad_query": 3, "grad_key_value": 2}[compiled.task]
    rows = "GROUP * HALO_H * HALO_W * 8" if compiled.task == "grad_key_value" else "0"
    arguments = launch.ARGUMENTS[compiled.task]
    facts = (
        f"SUB_H == {sub_h} && SUB_W == {sub_w}",
        f"SEEN_H == {seen_h} && SEEN_W == {seen_w} && PAIRS == {held.pairs}",
        f"HALO_H == {halo_h} && HALO_W == {halo_w}",
        f"__builtin_offsetof(Arguments, flip) + 4 == {128 * len(arguments.kept) + struct.calcsize(arguments.numbers)}",
        f"2 * HALO_ROOM + {tiles} * TILE_ROOM + 16 + {rows} == {compiled.shared}",
    )
    return "".join(f'\nstatic_assert({fact}, "");' for fact in facts)


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(count) for name, count in re.findall(r"(REG|STACK):(\d+)", told)}


def test_every_row_is_taken_by_what_it_names():
    for task, planes, row in plan.rows():
        kernel = (row.kernel, row.kernel)
        heads = heads_for(planes, row)
        chosen = plan.choose(task, planes, heads, row.depth, row.pixels, kernel, row.kernel // 2, SHARED)
        assert chosen is not None
        assert plan.suits(chosen, chosen.group(heads, row.depth, planes), planes)


def test_small_maps_have_plans_of_their_own():
    of = "forward", False, 2, 64
    assert plan.choose(*of, 2**15, (7, 7), 3, SHARED).tile == (8, 16)
    assert plan.choose(*of, 2**15 + 1, (7, 7), 3, SHARED).tile == (8, 8)


def test_no_plan_asks_for_more_shared_memory_than_there_is():
    kernel = (7, 7)
    assert plan.choose("forward", False, 1, 64, 2**20, kernel, 3, SHARED) is not None
    assert plan.choose("forward", False, 1, 64, 2**20, kernel, 3, 48 * 1024) is None


@pytest.fixture
def anywhere(monkeypatch):
    """As if there were a GPU that the kernels run on; what would be compiled is handed back."""
    monkeypatch.setattr(launch, "_available", lambda device: True)
    monkeypatch.setattr(launch, "_shared_limit", lambda device: SHARED)
    monkeypatch.setattr(launch, "Native", lambda compiled, device: compiled)
    launch._native.cache_clear()
    yield
    launch._native.cache_clear()


def asked(heads=2, depth=32, size=(9, 10), dtype=torch.bfloat16, kernel=(7, 7), layout="last", scale=1.0, **more):
    """What would be compiled for a forward over maps of a layout."""
    maps = [torch.zeros(2, heads * depth, *size, dtype=dtype) for _ in range(3)]
    if layout == "last":
        maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    elif layout == "chunks":
        maps = list(torch.zeros(2, 3 * heads * depth, *size, dtype=dtype).chunk(3, 1))
    elif layout == "chunks of the last":
        all_of_it = torch.zeros(2, 3 * heads * depth, *size, dtype=dtype)
        maps = list(all_of_it.contiguous(memory_format=torch.channels_last).chunk(3, 1))
    elif layout == "mixed":
        maps[0] = maps[0].contiguous(memory_format=torch.channels_last)
    elif layout == "unaligned":
        maps = [x.contiguous(memory_format=torch.channels_last)[:, 1:-1] for x in maps]
    names = "border", "dilation", "causal", "raster"
    window = Window(kernel, **{name: more.pop(name) for name in names if name in more})
    rules = Rules(window, scale, **more)
    maps = tuple(split_heads(x, heads) for x in maps)
    maps = *maps, empty_heads(maps[0], depth)
    problem = launches.Problem(rules, heads, heads, size, size)
    return launch.native("forward", problem, maps)


def test_windows_that_slide_over_channels_last_halves_are_served(anywhere):
    served = asked()
    assert (served.depth, served.group, served.kernel, served.lead) == (32, 2, (7, 7), (3, 3))
    assert asked(causal=(True, False)).lead == (6, 3)
    assert asked(kernel=(4, 7)).lead == (2, 3)
    assert asked(dtype=torch.float16, scale=-0.5).dtype == torch.float16
    assert asked(size=(1, 1)) == served


def test_windows_that_slide_over_planes_of_halves_are_served(anywhere):
    served = asked(layout="contiguous", size=(9, 16))
    assert (served.planes, served.group, served.shape.pad) == (True, 1, 5)
    assert asked(layout="chunks", size=(9, 16)) == served
    assert asked(layout="contiguous", size=(9, 16), kernel=(7, 9)).shape.pad == 4
    assert served._replace(task="grad_key_value", lead=(3, 0)).shape.pad == 2


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.float32},
        {"layout": "contiguous"},  # whose rows are no whole vectors
        {"layout": "unaligned"},
        {"layout": "mixed"},
        {"layout": "chunks of the last"},  # whose output is contiguous
        {"depth": 24},
        {"kernel": (41, 41)},
        {"scale": 0.0},
        {"scale": 1e-30},
        {"border": ("mask", "mask")},
        {"border": ("shift", "shift")},
        {"border": ("zeros", "reflect")},
        {"dilation": (1, 2)},
        {"raster": True},
        {"bias": torch.zeros(2, 49)},
        {"key_mask": torch.ones(2, 9, 10, dtype=torch.bool)},
    ],
    ids=lambda other: "-".join(other),
)
def test_all_else_is_left_to_triton(anywhere, other):
    assert asked(**other) is None


def test_nothing_is_served_while_kernels_are_to_be_portable(anywhere):
    with native.portable():
        assert asked() is None
    assert asked() is not None


def test_nothing_is_served_without_a_gpu():
    if not CUDA:
        assert asked() is None


TRITON = Target("triton", "cuda")


@pytest.fixture
def served(monkeypatch):
    """The tasks that native kernels are launched for."""
    tasks, ask = [], native.native

    def spy(task, *args):
        found = ask(task, *args)
        if found is not None:
            tasks.append(task)
        return found

    monkeypatch.setattr(native, "native", spy)
    return tasks


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@EVERY_ROW
@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.usefixtures("poison")
def test_every_plan_is_within_its_budget(task, planes, row, dtype, served, monkeypatch):
    """On a map of several tiles each way and a remainder, and on two images and two groups of heads."""
    choose = plan.choose
    launch._native.cache_clear()
    monkeypatch.setattr(launch, "choose", lambda name, *rest: row.plan if name == task else choose(name, *rest))
    heads, kernel = heads_for(planes, row), row.kernel
    size, layouts = ((11, 24), ("contiguous",) * 4) if planes else ((11, 19), ("channels_last",) * 4)
    kernels = [(kernel, min(kernel, 9))] if dtype == torch.bfloat16 else [(2, kernel), (kernel, 3)]
    for seed, sides in enumerate(kernels):
        more = {"layouts": layouts, "seed": seed}
        check(ATTENTION, problem(heads, row.depth, size, sides, **more), TRITON, dtype)
    check(ATTENTION, problem(2 * heads, row.depth, (5, 8), (3, 3), batch=2, layouts=layouts), TRITON, dtype)
    assert task in served
    launch._native.cache_clear()


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
    }
    shapes = {"heads": heads, "key_depth": depth, "value_depth": depth, "size": size, "kernel": kernel}
    return Problem(**usual | shapes | more)


@st.composite
def served_problems(draw):
    depth = draw(st.sampled_from(sorted(WIDEST)))
    sides = st.integers(1, WIDEST[depth])
    kernel = draw(st.one_of(sides.map(lambda k: (k, k)), st.tuples(sides, sides)))
    planes = draw(st.booleans())
    return problem(
        draw(st.integers(1, 64 // depth)),
        depth,
        (draw(st.integers(1, 17)), draw(st.sampled_from((8, 16, 24)) if planes else st.integers(1, 17))),
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
@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.usefixtures("poison")
def test_random_problems(dtype, served):
    for_each(served_problems(), 20, f"native {dtype}", lambda each: check(ATTENTION, each, TRITON, dtype))
    assert set(served) == {"forward", "grad_query", "grad_key_value"}


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.usefixtures("poison")
def test_large_logits_and_small_scales():
    """Weights that are all but one key's, and logits as large as halves make them."""
    for scale, spread in ((None, 100.0), (1e-6, 1.0), (2.0**50, 30.0)):
        check(ATTENTION, problem(2, 32, (9, 17), (5, 5), scale=scale, spread=spread), TRITON, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_results_are_the_same_every_time_and_in_a_graph():
    maps = [torch.randn(2, 64, 33, 47, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
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
@pytest.mark.usefixtures("poison")
def test_signs_of_the_scale(scale, layout, served):
    layouts = (layout,) * 4
    check(ATTENTION, problem(2, 32, (9, 16), (5, 6), scale=scale, layouts=layouts), TRITON, torch.float16)
    assert set(served) == {"forward", "grad_query", "grad_key_value"}


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_the_first_that_a_thread_does_on_a_gpu():
    """As in the thread in which autograd runs a backward pass."""
    maps = [torch.randn(1, 16, 9, 9, device="cuda", dtype=torch.float16) for _ in range(3)]
    maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    results = []
    thread = threading.Thread(target=lambda: results.append(local_attention(*maps, 3)))
    thread.start()
    thread.join()
    assert torch.equal(results[0], local_attention(*maps, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_maps_past_two_to_the_31_elements():
    """One head of 64 channels: the last rows are those of the same map cut off there."""
    size = 6000
    maps = [torch.randn(1, 64, size, size, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    out = local_attention(*maps, 5)[:, :, -20:]
    with native.portable():
        cut = local_attention(*(x[:, :, -40:].contiguous(memory_format=torch.channels_last) for x in maps), 5)
    torch.testing.assert_close(out, cut[:, :, -20:], rtol=2e-2, atol=2e-2)
