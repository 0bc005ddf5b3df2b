"""The native kernels without a GPU: what they serve, and what they are compiled to."""

import importlib
import itertools
import struct
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from conftest import CUDA
from image_local_attention.kernels import gpu, native
from image_local_attention.kernels import launch as launches
from image_local_attention.kernels.native import driver, launch, nvrtc, plan, table
from image_local_attention.maps import empty_heads, split_heads
from image_local_attention.rules import Rules
from image_local_attention.window import Window

NVRTC = nvrtc.find(torch.version.cuda.split(".")[0] if torch.version.cuda else "13")
SHARED = 227 * 1024

needs_nvrtc = pytest.mark.skipif(NVRTC is None, reason="NVRTC is not installed")


def heads_for(task: str, form: plan.Form, row: table.Row) -> int:
    """The most heads that share a block of this plan."""
    most = 1 if form.planes else max(1, row.plan.pixel_bytes // (form.element * row.depth))
    fitting = (heads for heads in (4, 2, 1) if heads <= most)
    return next(heads for heads in fitting if plan.suits(task, row.plan, row.plan.group(heads, row.depth, form), form))


def kinds() -> list:
    """A row of the table for each task, form, way to hold the halo and to share it, and place and height of tiles."""
    found = {}
    for task, form, row in table.rows():
        group = row.plan.group(heads_for(task, form, row), row.depth, form)
        shares = row.plan.units, row.plan.shared_by, group
        kind = task, form, row.plan.band, row.plan.slots, *shares, row.plan.shifted, row.plan.tile[0] > 4
        found.setdefault(kind, (task, form, row))
    return list(found.values())


def noting(tasks: list[str]):
    """`native.native`, which adds the tasks that native kernels are launched for to a list."""
    ask = native.native

    def spy(task, *args):
        found = ask(task, *args)
        if found is not None:
            tasks.append(task)
        return found

    return spy


def compiled_for(task, form: plan.Form, row: table.Row, kernel: tuple[int, int], dtype=None) -> launch.Compiled:
    group = row.plan.group(heads_for(task, form, row), row.depth, form)
    lead = kernel[0] // 2, kernel[1] // 2
    dtype = dtype or (torch.bfloat16 if form.product == "half" else torch.float32)
    return launch.Compiled(task, row.plan, form, dtype, row.depth, group, kernel, lead)


def row_name(job) -> str:
    task, form, row = job
    layout, heads = "planes" if form.planes else "rows", heads_for(task, form, row)
    size = "small-" if row.pixels < 2**20 else ""
    return (
        f"{task}-{form.product}-{size}{layout}-{heads}x{row.depth}-k{row.kernel}-{row.plan.tile[0]}x{row.plan.tile[1]}"
    )


EVERY_ROW = pytest.mark.parametrize(("task", "form", "row"), table.rows(), ids=map(row_name, table.rows()))


@needs_nvrtc
@EVERY_ROW
def test_every_plan_compiles_and_keeps_its_registers(task, form, row, monkeypatch):
    """A few words may be spilled where more blocks share a multiprocessor for it. Newer GPUs: one of each kind."""
    monkeypatch.setattr(nvrtc, "library", lambda: NVRTC)
    compiled = compiled_for(task, form, row, (row.kernel, row.kernel))
    assert compiled.shared <= SHARED
    source = compiled.source + agreement(compiled)
    for arch in (90, 100, 120) if (task, form, row) in kinds() else (90,):
        cubin, _ = nvrtc.build(source, (f"--gpu-architecture=sm_{arch}", *compiled.options))
        assert cubin
        if arch == 90:  # where plans were measured
            assert importlib.import_module("benchmarks.native_plans").stack_of(cubin) <= 64


def test_the_search_tries_what_the_table_has(monkeypatch):
    """Plans of fp32 and of planes are among those that `benchmarks.native_plans` times at the design's cases."""
    search = importlib.import_module("benchmarks.native_plans")
    monkeypatch.setattr(search, "limit", lambda: SHARED)
    monkeypatch.setattr(search.gpus, "of", lambda device: gpu.Gpu(90, True))
    cases = [case for case in search.GROUPS["design"] if case.dtype == "fp32" or case.layout == "nchw"]
    for case, task in itertools.product(cases, (*search.TASKS, *plan.UNFUSED)):
        if case.dtype != "fp32" and task in plan.UNFUSED:
            continue
        problem, lead = search.Problem(case, task), case.kernel // 2
        chosen = table.choose(task, problem.form, case.heads, case.depth, case.queries, problem.kernel, lead, SHARED)
        monkeypatch.setattr(problem.__class__, "_walks", lambda self: ())
        candidates = [replace(each, pixel_bytes=128) for each in problem.candidates()]
        assert chosen is None or replace(chosen, pixel_bytes=128) in candidates
        assert len(set(candidates)) == len(candidates)


@needs_nvrtc
def test_windows_of_any_sides_compile(monkeypatch):
    monkeypatch.setattr(nvrtc, "library", lambda: NVRTC)
    tasks = ("forward", 16), ("grad_key_value", 32), ("similarity", 16), ("aggregate_transpose", 64)
    for (task, depth), product, planes in itertools.product(tasks, ("half", "three-pass"), (False, True)):
        form = plan.Form(product, planes)
        rows = [row for *of, row in table.rows() if of == [task, form] and row.depth == depth]
        for kernel in (1, 2), (4, 7), (9, 2):
            row = next(row for row in rows if max(kernel) <= row.kernel)
            compiled = compiled_for(task, form, row, kernel)
            source = compiled.source + agreement(compiled)
            assert nvrtc.build(source, ("--gpu-architecture=sm_90", *compiled.options))


def agreement(compiled: launch.Compiled) -> str:
    """Source that does not compile unless kernels take what `plan` says, and arguments end where `launch` says."""
    tiles = {"grad_query": 3, "grad_key_value": 2}.get(compiled.task, 1)
    pixels = {
        "grad_key_value": "GROUP * HALO_PIXELS * sizeof(Query)",
        "similarity": "GROUP * TILE_H * WeightTile::ROW * ELEMENT",
        "aggregate": "GROUP * TILE_H * WeightTile::ROW * ELEMENT",
    }.get(compiled.task, "0")
    last = {"forward": "flip", "grad_query": "flip", "grad_key_value": "after_grad_query"}.get(compiled.task, "scale")
    arguments = launch.ARGUMENTS[compiled.task]
    room = "+".join(f"sizeof({kind})" for kind in arguments.of_maps("KeptMap", "TensorMap", "ResultMap"))
    facts = (
        f"PAIRS == {compiled.shape.pairs}",
        f"__builtin_offsetof(Arguments, {last}) + 4 == {room} + {struct.calcsize(arguments.numbers)}",
        f"Halos::ROOM + {tiles} * Kept::ROOM + Halos::BARRIERS + {pixels} == {compiled.shared}",
    )
    return "".join(f'\nstatic_assert({fact}, "");' for fact in facts)


def test_every_row_is_taken_by_what_it_names():
    for task, form, row in table.rows():
        kernel = (row.kernel, row.kernel)
        heads = heads_for(task, form, row)
        chosen = table.choose(task, form, heads, row.depth, row.pixels, kernel, row.kernel // 2, SHARED)
        assert chosen is not None
        assert plan.suits(task, chosen, chosen.group(heads, row.depth, form), form)


def test_warps_take_turns_where_there_are_several_bands():
    """Not at windows so low that a tile's halo is one, which other plans serve, or Triton."""
    shared = [job for job in table.rows() if job[2].plan.shared_by > 1]
    assert shared
    for (task, form, row), height in itertools.product(shared, range(1, 6)):
        kernel, lead = (height, row.kernel), row.kernel // 2
        chosen = table.choose(task, form, 1, row.depth, row.pixels, kernel, lead, SHARED)
        bands = chosen and plan.shape(task, chosen, kernel, lead, form).bands
        assert chosen is None or chosen.shared_by == 1 or bands > 1
        if plan.shape(task, row.plan, kernel, lead, form).bands > 1:
            assert chosen is not None


HALF = plan.Form("half", False)


def test_small_maps_have_plans_of_their_own():
    of = "forward", HALF, 2, 64
    assert table.choose(*of, 2**15, (7, 7), 3, SHARED).tile == (8, 16)
    assert table.choose(*of, 2**15 + 1, (7, 7), 3, SHARED).tile == (8, 8)


def test_no_plan_asks_for_more_shared_memory_than_there_is():
    kernel = (7, 7)
    assert table.choose("forward", HALF, 1, 64, 2**20, kernel, 3, SHARED) is not None
    assert table.choose("forward", HALF, 1, 64, 2**20, kernel, 3, 16 * 1024) is None


@pytest.mark.parametrize("kernel", range(1, 22))
def test_channels_of_planes_of_floats_lie_in_different_banks(kernel):
    """A row of a fragment is 8 columns of one of 4 channels, whose bands are so many floats apart."""
    for task, form, row in table.rows():
        if form.product != "half" and form.planes and row.plan.band in (0, 2):
            rows, cols = compiled_for(task, form, row, (kernel, kernel)).shape.band
            assert rows * cols % 16 == 8
            assert cols % 4 == 0


@pytest.fixture
def anywhere(monkeypatch):
    """As if there were a GPU that the kernels run on; what would be compiled is handed back."""
    monkeypatch.setattr(launch, "_available", lambda device: True)
    monkeypatch.setattr(launch.gpus, "of", lambda device: gpu.Gpu(90, True))
    monkeypatch.setattr(launch, "_shared_limit", lambda device: SHARED)
    monkeypatch.setattr(launch, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(launch, "Native", lambda compiled, device: compiled)
    launch._native.cache_clear()
    yield
    launch._native.cache_clear()


def asked(
    heads=2,
    depth=32,
    size=(9, 10),
    dtype=torch.bfloat16,
    kernel=(7, 7),
    layout="last",
    scale=1.0,
    task="forward",
    **more,
):
    """What would be compiled for a task over maps of a layout."""
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
    return launch.native(task, problem, maps[:2] if task in plan.UNFUSED else maps)


def test_windows_that_slide_over_channels_last_halves_are_served(anywhere):
    served = asked()
    assert (served.depth, served.group, served.kernel, served.lead) == (32, 2, (7, 7), (3, 3))
    assert asked(causal=(True, False)).lead == (6, 3)
    assert asked(kernel=(4, 7)).lead == (2, 3)
    assert asked(dtype=torch.float16, scale=-0.5).dtype == torch.float16
    assert asked(size=(1, 1)) == served


def test_windows_that_slide_over_planes_of_halves_are_served(anywhere):
    served = asked(layout="contiguous", size=(9, 16))
    assert (served.form.planes, served.group) == (True, 1)
    assert asked(layout="chunks", size=(9, 16)) == served


def test_halos_of_planes_begin_with_whole_vectors(anywhere):
    """By columns that are not seen, or by tiles that begin before the map, if subtiles see fewer blocks then."""

    def begin(shifted, kernel, task="forward", lead=None):
        width, (_, cols) = plan.Plan((4, 32), 8, 1, 1, shifted=shifted), kernel
        held = plan.shape(task, width, kernel, cols // 2 if lead is None else lead, plan.Form("half", True))
        return held.pad, held.before, held.offset, held.seen[1]

    assert begin(False, (7, 7)) == (5, 0, 0, 24)
    assert begin(True, (7, 7)) == (0, 5, 3, 16)
    assert begin(True, (3, 9)) == (0, 4, 4, 16)
    assert begin(True, (21, 21)) == (0, 6, 2, 32)
    assert begin(True, (13, 13)) == (2, 0, 0, 24)  # 3 blocks in any case
    assert begin(True, (7, 7), lead=6) == (2, 0, 0, 16)
    assert begin(True, (7, 7), "similarity") == (5, 0, 0, 24)  # whose rows of weights begin with whole vectors
    served = asked(layout="contiguous", size=(9, 64))
    assert (served.shape.before, served.plan.tile[1]) == (5, 64)
    assert served.grid(2, 1, 9, 64)[0] == 2
    assert served.grid(2, 1, 9, 56)[0] == 1


def test_windows_that_slide_over_floats_are_served(anywhere):
    served = asked(dtype=torch.float32)
    assert (served.form, served.group, served.lead) == (plan.Form("three-pass", False), 1, (3, 3))
    tf32 = asked(dtype=torch.float32, depth=64, layout="contiguous", size=(9, 12), precision="tf32")
    assert tf32.form == plan.Form("tf32", True)
    planes = asked(dtype=torch.float32, layout="contiguous", size=(9, 12))  # rows of whole vectors of floats
    assert (planes.form, planes.shape.pad) == (plan.Form("three-pass", True), 1)
    assert asked(dtype=torch.float32, kernel=(21, 21)).plan.band
    assert asked(heads=4, depth=16, dtype=torch.float32).group == 1


def test_launches_begin_early_where_little_goes_through_the_l1_cache(anywhere):
    floats = {"dtype": torch.float32}
    assert asked().early
    assert asked(kernel=(13, 13)).early
    assert asked(**floats).early
    assert not asked(kernel=(5, 9), **floats).early
    assert not asked(depth=64, layout="contiguous", size=(9, 12), precision="tf32", **floats).early
    assert not any(asked(task=task).early for task in plan.UNFUSED)


@pytest.mark.parametrize("task", plan.UNFUSED)
def test_unfused_operators_are_served_at_any_scale(anywhere, task):
    for layout, size in ("last", (9, 10)), ("contiguous", (9, 16)):
        for dtype in torch.bfloat16, torch.float32:
            for kernel, scale in ((5, 5), 0.0), ((21, 21), 1e-30), ((4, 7), -1.0):
                served = asked(layout=layout, size=size, dtype=dtype, kernel=kernel, scale=scale, task=task)
                assert (served.task, served.kernel, served.form.planes) == (task, kernel, layout != "last")
    assert asked(kernel=(23, 23), task=task) is None
    wide = asked(size=(1, 2**17), depth=16, heads=1, kernel=(21, 21), task=task)
    assert (wide is None) == (task == "aggregate_transpose")
    assert asked(raster=True, task=task) is None
    assert asked(border=("mask", "mask"), task=task) is None
    assert asked(bias=torch.zeros(2, 49), task=task) is None


@pytest.mark.parametrize("entry", [native.similarity, native.aggregate, native.aggregate_transpose])
def test_weights_that_are_no_rows_of_whole_vectors_are_left_to_triton(anywhere, monkeypatch, entry):
    launched = []
    monkeypatch.setattr(launch, "Native", lambda compiled, device: lambda *args: launched.append(args))
    problem = launches.Problem(Rules(Window((3, 3))), 1, 1, (8, 8), (8, 8))
    maps = [torch.zeros(1, 8, 8, 16).movedim(3, 1).unflatten(1, (1, 16)).movedim(2, 4) for _ in range(2)]
    served = torch.zeros(1, 1, 8, 8, 9)
    others = (
        torch.zeros(1, 1, 9, 8, 8).movedim(2, 4),
        torch.zeros(1 + 8 * 8 * 9)[1:].view(1, 1, 8, 8, 9),
        served.bfloat16(),
    )

    def ask(weight):
        return entry(*maps, weight, problem) if entry is native.similarity else entry(weight, *maps, problem)

    assert [ask(weight) for weight in (served, *others)] == [True, False, False, False]
    assert len(launched) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.float64},
        {"dtype": torch.float32, "depth": 64, "precision": "tf32"},  # where Triton's forward is as fast
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


def test_a_thread_has_a_context_before_it_describes_maps(monkeypatch):
    """Another may have loaded the kernel."""
    calls = []
    library = SimpleNamespace(cuTensorMapEncodeTiled=lambda *given: calls.append("encode") or 0)
    monkeypatch.setattr(driver, "bind_thread", lambda: calls.append("bind"))
    monkeypatch.setattr(driver, "driver", lambda: library)
    driver._tensor_map.cache_clear()
    assert len(driver.tensor_map("cxy", (16, 4, 4), 32, torch.zeros(1, 1, 4, 4, 16).half())) == 128
    assert calls == ["bind", "encode"]
    driver._tensor_map.cache_clear()


def test_nothing_is_served_without_a_gpu():
    if not CUDA:
        assert asked() is None
