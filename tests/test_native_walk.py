"""Native kernels whose blocks walk: what they are compiled to, and how maps are cut for them."""

import importlib
import itertools
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from image_local_attention.kernels import gpu, native
from image_local_attention.kernels.native import launch, nvrtc, walk, walk_table
from image_local_attention.kernels.native.compiled import ARGUMENTS
from image_local_attention.kernels.native.plan import Form
from image_local_attention.kernels.native.walk import Walk, WalkPlan
from test_native import NVRTC, SHARED, anywhere, asked, needs_nvrtc  # noqa: F401

WAITING = "serialized"  # of products, in what compilers say
FUSED = "forward", "grad_query", "grad_key_value"
# Task, channels per head, columns of a tile, groups and columns of chunks that fill the registers.
FULL = {
    ("forward", 16, 16, 4, 64),
    ("forward", 32, 16, 6, 64),
    ("forward", 128, 16, 4, 0),
    ("grad_query", 16, 8, 4, 32),
    ("grad_query", 16, 16, 4, 64),
    ("grad_query", 32, 16, 4, 64),
    ("grad_query", 32, 16, 6, 0),
    ("grad_key_value", 64, 16, 3, 64),
    ("grad_key_value", 128, 8, 2, 32),
    ("grad_key_value", 128, 16, 2, 64),
}


def compiled_for(kernel, plan=None, task="grad_key_value", planes=False, dtype=torch.bfloat16, depth=64) -> Walk:
    lead = kernel[0] // 2, kernel[1] // 2
    return Walk(task, plan or WalkPlan(), planes, dtype, depth, kernel, lead, 132)


def built(compiled: Walk, source: str | None = None) -> tuple[bytes, str]:
    return nvrtc.build(source or compiled.source, ("--gpu-architecture=sm_90a", *compiled.options))


def jobs() -> list:
    """Every row of the table at its widest window, and windows of every width of halos."""
    rows = [
        (*key, room - 2 * row.padded, row.plan, row.kernel) for (*key, room), of in walk_table.table() for row in of
    ]
    rows += [("grad_key_value", False, 64, WalkPlan(), side) for side in range(1, 22, 4)]
    rows += [(task, True, 64, WalkPlan((8, 8), 2, 8, 2), side) for task, side in zip(FUSED, (3, 8, 12), strict=True)]
    return [(*job, (torch.bfloat16, torch.float16)[i % 2]) for i, job in enumerate(dict.fromkeys(rows))]


@needs_nvrtc
@pytest.mark.parametrize(("task", "planes", "depth", "plan", "side", "dtype"), jobs(), ids=str)
def test_kernels_compile_and_do_not_wait_for_each_product(task, planes, depth, plan, side, dtype, monkeypatch):
    """Compilers say where they make each product wait for the one before.

    They do for want of registers; the plans that it does not make slower are known.
    """
    monkeypatch.setattr(nvrtc, "library", lambda: NVRTC)
    compiled = compiled_for((side, side), plan, task, planes, dtype, depth)
    arguments = ARGUMENTS[task]
    numbers, last = struct.calcsize(arguments.numbers), "after_grad_query" if task == "grad_key_value" else "flip"
    inputs = len(arguments.kept) - arguments.results
    agreement = (
        f'\nstatic_assert(ROOM == {compiled.shared}, "");'
        f"\nconstexpr int MAPS = {inputs} * sizeof(TensorMap) + {arguments.results} * sizeof(StridedMap<Number>);"
        f'\nstatic_assert(__builtin_offsetof(Arguments, {last}) + 4 == MAPS + {numbers}, "");'
    )
    cubin, log = built(compiled, compiled.source + agreement)
    full = (task, compiled.room, plan.tile[1], plan.groups, plan.chunk) in FULL
    assert importlib.import_module("benchmarks.native_plans").stack_of(cubin) <= (96 if full else 64)
    assert (WAITING in log) == full
    assert compiled.shared <= SHARED
    assert compiled.fits


@needs_nvrtc
def test_compilers_say_where_products_wait(monkeypatch):
    """With fewer registers than the widest kernel asks for."""
    monkeypatch.setattr(nvrtc, "library", lambda: NVRTC)
    compiled = compiled_for((21, 21))
    source = compiled.source.replace("more_registers<REGISTERS>", "more_registers<200>")
    assert WAITING in built(compiled, source)[1]


@needs_nvrtc
def test_windows_too_tall_for_the_bands_that_are_held_do_not_compile(monkeypatch):
    """A group would wait for a band that comes only when it lets go of another."""
    monkeypatch.setattr(nvrtc, "library", lambda: NVRTC)
    for kernel, slots in ((33, 11), 6), ((29, 11), 5):
        plan = WalkPlan(slots=slots)
        compiled, taller = compiled_for(kernel, plan), compiled_for((kernel[0] + 1, 11), plan)
        assert compiled.fits
        assert not taller.fits
        assert built(compiled)[0]
        with pytest.raises(nvrtc.CompileError, match="a tile's last band"):
            built(taller)


def test_windows_fit_whose_halo_is_no_wider_than_a_copy():
    for tile, widest in ((8, 8), 25), ((4, 16), 17):
        assert compiled_for((9, widest), WalkPlan(tile, 2), "forward", planes=True).fits
        assert not compiled_for((9, widest + 1), WalkPlan(tile, 2), "forward", planes=True).fits
    assert not compiled_for((9, 9), WalkPlan((4, 16), 8), "forward", planes=True).fits  # tiles begin with a band
    assert not compiled_for((9, 9), WalkPlan((8, 8), 2, 8, 1), "forward", planes=True).fits  # one group has no other
    odd = WalkPlan((8, 8), 1, 12, 3)  # two rows are taken together where channels lie side by side
    assert compiled_for((9, 9), odd, planes=True).fits
    assert not compiled_for((9, 9), odd).fits


def test_sets_that_are_apart_fit_whatever_the_window():
    """If chunks are whole blocks, and tiles side by side see the same one."""
    for planes, task, chunk in (True, "forward", 32), (True, "forward", 64), (False, "grad_query", 40):
        plan = WalkPlan((8, 8), 2, 2, 2, chunk=chunk)
        for kernel in (5, 5), (127, 127), (3, 127):
            compiled = compiled_for(kernel, plan, task, planes=planes)
            assert compiled.fits
            assert compiled.chunks * chunk >= 8 + kernel[1] - 1 > (compiled.chunks - 1) * chunk
        assert compiled.halo == (2, chunk)
        assert not compiled_for((5, 5), replace(plan, slots=1), task, planes=planes).fits
    assert not compiled_for((5, 5), WalkPlan((8, 8), 2, 2, 2, chunk=40), "forward", planes=True).fits
    assert not compiled_for((5, 5), WalkPlan((8, 8), 2, 2, 2, chunk=28)).fits  # an odd number of blocks
    assert compiled_for((5, 5), WalkPlan((8, 8), 4, 2, 2, chunk=28)).fits
    side_by_side = WalkPlan((4, 16), 1, 4, 4, 2, chunk=64)
    assert compiled_for((9, 33), side_by_side, "forward", planes=True).fits
    assert not compiled_for((9, 34), side_by_side, "forward", planes=True).fits  # of two chunks


def test_blocks_have_whole_sets_that_are_apart():
    """One each where a set has many bands."""
    plan = WalkPlan((4, 16), 1, 6, 4, 2, chunk=64)
    few, many = (compiled_for((rows, 31), plan, "forward", planes=True) for rows in (31, 101))
    assert (few.set_bands, many.set_bands) == (38, 108)
    assert few.grid(2, 3, 500, 64) == (3 * 2, walk.parts(63, 3 * 2 * 2, 132), 2)
    assert many.grid(2, 3, 500, 64) == (3 * 2, 63, 2)
    assert compiled_for((31, 81), plan, "forward", planes=True).set_bands == 2 * 38


def test_tiles_side_by_side_fit_whose_halo_is_no_wider_than_a_copy_of_64_columns():
    """And of which each finds what its products take in that halo; groups have the tiles in turns."""
    for tile, abreast, widest in ((4, 16), 3, 17), ((4, 16), 2, 33), ((8, 8), 3, 41), ((8, 8), 6, 9):
        plan = WalkPlan(tile, 2, 8, abreast, abreast)
        assert compiled_for((9, widest), plan, "forward", planes=True).fits
        assert not compiled_for((9, widest + 1), plan, "forward", planes=True).fits
        assert not compiled_for((9, widest), replace(plan, groups=abreast + 1), "forward", planes=True).fits
    assert not compiled_for((3, 3), WalkPlan((4, 16), 2, 1, 2), "forward", planes=True).fits  # one band is held too
    assert not compiled_for((3, 3), WalkPlan((4, 16), 2, 8, 8), "forward", planes=True).fits  # too many threads
    for other in {"abreast": 2}, {"one_by_one": True}, {"tile": (4, 16)}:
        assert not compiled_for((9, 9), replace(WalkPlan(), **other)).fits


def test_products_of_tiles_side_by_side_take_steps_of_16_columns():
    sizes = ((4, 16), 7, 32, 64), ((4, 16), 19, 48, 64), ((8, 8), 9, 16, 32), ((8, 8), 20, 32, 64)
    for tile, width, seen, halo in sizes:
        compiled = compiled_for((7, width), WalkPlan(tile, 2, 8, 2, 2), "forward", planes=True)
        assert (compiled.seen, compiled.halo[1]) == (seen, halo)


def test_tiles_of_planes_begin_where_halos_can():
    """On whole vectors of 8 columns; a kept map's tile is copied from such a one on."""
    compiled = compiled_for((15, 21), WalkPlan((8, 8), 2), "forward", planes=True)
    assert (compiled.before, compiled.pad, compiled.kept_box, compiled.halo) == (6, 0, (8, 16), (2, 32))
    assert compiled.grid(1, 3, 8, 64)[0] == 3 * 9
    assert compiled_for((21, 21)).before == 0


def test_halos_of_tiles_16_wide_begin_where_tiles_do():
    """With columns that none of them sees, so that results are whole vectors."""
    plan = WalkPlan((4, 16), 2, 8, 4, 2)
    for width, pad in (3, 7), (7, 5), (14, 1), (17, 0):
        compiled = compiled_for((7, width), plan, "forward", planes=True)
        assert (compiled.before, compiled.pad, compiled.kept_box) == (0, pad, (4, 32))
        assert compiled.grid(1, 3, 8, 64)[0] == 3 * 2


@given(st.integers(1, 400), st.integers(1, 3000), st.integers(1, 160))
def test_columns_are_cut_into_blocks_of_which_none_is_empty(rows, columns, multiprocessors):
    count = walk.parts(rows, columns, multiprocessors)
    most = -(-rows // count)
    assert (count - 1) * most < rows <= count * most


def test_blocks_share_the_multiprocessors_evenly():
    assert walk.parts(64, 64, 132) == 2
    assert walk.parts(16, 16 * 64, 132) == 1
    assert walk.parts(64, 132, 132) == 1
    assert compiled_for((21, 21)).grid(8, 2, 500, 333) == (2 * 42, walk.parts(63, 2 * 42 * 8, 132), 8)


def walking(kernel=(21, 21), **more):
    return asked(**{"heads": 1, "depth": 64, "kernel": kernel, "task": "grad_key_value"} | more)


@pytest.mark.usefixtures("anywhere")
def test_blocks_walk_over_wide_windows_of_64_channels_side_by_side(monkeypatch):
    assert walking() == Walk("grad_key_value", WalkPlan(), False, torch.bfloat16, 64, (21, 21), (10, 10), 132)
    assert walking(heads=3, dtype=torch.float16, causal=(True, False)).lead == (20, 10)
    assert isinstance(walking((11, 12)), Walk)
    others = (
        {"kernel": (10, 21)},
        {"layout": "contiguous", "size": (9, 16), "kernel": (2, 13)},
        {"dtype": torch.float32},
        {"depth": 16},
    )
    for other in others:
        assert isinstance(walking(**other), launch.Compiled)
    monkeypatch.setattr(launch.gpus, "of", lambda device: gpu.Gpu(100, True))
    launch._native.cache_clear()
    assert isinstance(walking(), launch.Compiled)


@pytest.mark.usefixtures("anywhere")
def test_blocks_walk_over_the_windows_of_the_table():
    """Of a row's sizes, of one and the other side."""
    most = 2**40  # pixels
    for (task, planes, room), rows in walk_table.table():
        asks = {"task": task, "size": (9, 16), "layout": "contiguous" if planes else "last"}
        for row in rows:
            if row.above == row.plane == 0:
                asks["depth"] = room - row.padded
                assert isinstance(walking((row.least, row.kernel), **asks), Walk)
                assert isinstance(walking((row.kernel, row.least), **asks), Walk)
        for i, row in enumerate(rows):
            pixels, depth = min(row.pixels, most), room - row.padded
            taken = [each for each in rows[:i] if each.above < pixels <= each.pixels and each.plane <= row.plane]
            before = (each.kernel + 1 for each in taken if row.padded or not each.padded)
            side = max([row.least, *before])  # of windows that no row before takes
            assert walk_table.choose(task, planes, depth, pixels, row.plane, (side, row.kernel)) == row.plan
            if row.padded:
                assert walk_table.choose(task, planes, room, pixels, row.plane, (row.least, row.least)) is None
        rows = [row for row in rows if not row.padded]
        least, widest = min(row.least for row in rows), max(row.kernel for row in rows)
        for kernel in (least - 1, widest), (widest, widest + 1):
            assert walk_table.choose(task, planes, room, most, most, kernel) is None
    asks = {"task": "forward", "layout": "contiguous", "size": (9, 16), "causal": (True, False)}
    assert walking((17, 17), **asks).lead == (16, 8)
    assert walking((17, 17), depth=48, **asks).room == 64
    assert walking((17, 17), depth=129, **asks) is None
    # channels side by side
    assert walking((17, 17), depth=48, task="forward") is None
    assert not walk_table.serves("forward", Form("half", False), 48, 16, 90)
    assert not compiled_for((17, 17), task="forward", depth=48).fits


@pytest.mark.usefixtures("anywhere")
def test_plans_are_of_the_size_of_planes_and_of_all_maps():
    planes = {"task": "grad_query", "kernel": (9, 9), "layout": "contiguous"}
    assert walking(size=(1024, 1024), **planes).plan == WalkPlan((4, 16), 2, 7, 3)
    assert walking(size=(1536, 1024), **planes).plan == WalkPlan((4, 16), 1, 6, 4, 2)
    for size, walks in ((128, 128), False), ((128, 136), True):
        assert isinstance(walking(size=size, task="grad_query"), Walk) == walks


def test_small_maps_do_not_walk_over_wide_windows_of_channels_side_by_side():
    for task, depth in ("forward", 64), ("grad_query", 64), ("forward", 128):
        few, more = (walk_table.choose(task, False, depth, count, 2**14, (21, 21)) for count in (2**15, 2**15 + 1))
        assert few is None
        assert more is not None


def test_whatever_window_is_asked_for_the_chosen_plan_fits():
    """Centred and causal, even and thin."""
    sides = *range(1, 22, 2), 8, 12, 14, 18, 25, 26, 42, 57, 64, 127
    asked_for = [(*key[:2], key[2] - less) for key in dict(walk_table.table()) for less in (0, key[1])]
    for task, planes, depth in asked_for:
        maps = (2**10, 2**10), (2**18, 2**18), (2**24, 2**14), (2**20, 2**20), (2**24, 2**22)
        for kernel, (pixels, plane) in itertools.product(itertools.product(sides, sides), maps):
            plan = walk_table.choose(task, planes, depth, pixels, plane, kernel)
            for leads in itertools.product(*((k // 2, k - 1) for k in kernel)):
                each = plan and Walk(task, plan, planes, torch.bfloat16, depth, kernel, leads, 132)
                assert each is None or (each.fits and each.shared <= SHARED)


@pytest.mark.usefixtures("anywhere")
def test_blocks_walk_wherever_they_are_asked_to_and_can():
    with native.using("grad_key_value", WalkPlan(slots=5)):
        assert walking((3, 5)).plan == WalkPlan(slots=5)
        assert walking((30, 9)) is None
        assert walking((9, 26)) is None
        assert walking(dtype=torch.float32) is None
        assert walking(depth=32) is None
    with native.using("forward", WalkPlan((4, 16), 2)):  # of planes alone
        assert walking((9, 9), task="forward") is None
        assert walking((9, 9), task="forward", layout="contiguous", size=(9, 16)).plan == WalkPlan((4, 16), 2)
