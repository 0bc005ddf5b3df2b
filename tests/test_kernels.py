"""The kernels themselves: they compile for every GPU, plans spill no registers, each plan computes what it should."""

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import CUDA

pytest.importorskip("triton")
from image_local_attention import local_attention, local_similarity
from image_local_attention.kernels import gpu, launch, native, plan
from image_local_attention.kernels.gpu import padded

COMPILE = Path(__file__).with_name("compile_kernels.py")
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
KERNELS = {
    "forward_kernel",
    "delta_kernel",
    "grad_query_kernel",
    "grad_key_value_kernel",
    "similarity_kernel",
    "aggregate_kernel",
    "aggregate_transpose_kernel",
    "bias_gradient_kernel",
}
SHARED_LIMIT = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KiB a program may take


def compile_for(target: str, *options: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(COMPILE), target, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        print(target, row)
    return rows


@pytest.mark.skipif(CUDA, reason="compiles for GPUs that are not there; a real driver would get in the way")
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target):
    rows = compile_for(target)
    assert {row["kernel"] for row in rows} == KERNELS
    assert all(row["shared"] <= SHARED_LIMIT[target] * 1024 for row in rows)


@pytest.mark.skipif(CUDA, reason="compiles for GPUs that are not there; a real driver would get in the way")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_kernel_compiles_with_options(target):
    rows = compile_for(target, "--options")
    assert {row["kernel"] for row in rows} == KERNELS | {"frame_kernel", "pair_sums_kernel"}
    assert all(row["shared"] <= SHARED_LIMIT[target] * 1024 for row in rows)


@pytest.mark.skipif(CUDA, reason="compiles for GPUs that are not there; a real driver would get in the way")
@pytest.mark.parametrize("task", ["forward", "grad_query", "grad_key_value"])
def test_no_plan_spills_registers(task):
    rows = compile_for("sm_90", "--plans", task)
    compiled = {row["case"].rpartition(", width ")[0] for row in rows}
    assert len(compiled) == sum(row_task == task for row_task, *_ in plan.plans())
    assert [row for row in rows if row["spills"]] == []


def test_tiles_of_planes_are_whole_vectors():
    """Tiles are shifted until halos begin on 16 bytes, and stay there only if they are as wide."""
    for _, product, planes, row in plan.plans():
        assert not planes or row.plan.tile[1] % (8 if product == "half" else 4) == 0, row


@pytest.mark.parametrize(
    "missing", [every for n in range(5) for every in itertools.combinations(sorted(plan.FACTS), n)], ids=str
)
def test_every_window_has_a_plan_that_has_what_it_wants(missing):
    facts = plan.FACTS.difference(missing)
    for task, product, planes, row in plan.plans():
        assert plan.FACTS.issuperset(row.wants.split())
        for width in (1, row.width):
            chosen = plan.choose(task, product, row.depth, width, planes, facts)
            table = plan._TABLE[task][product, planes]
            assert any(each.plan == chosen and facts.issuperset(each.wants.split()) for each in table)


@pytest.mark.parametrize(
    ("task", "product", "depth", "kernel", "dilation", "by_pointer", "whole"),
    [
        ("forward", "half", 64, 7, 4, True, True),
        ("forward", "half", 64, 31, 4, True, False),
        ("forward", "half", 64, 7, 9, False, False),
        ("grad_query", "half", 16, 7, 2, False, True),
        ("grad_query", "half", 16, 7, 3, False, False),
        ("forward", "three-pass", 64, 7, 3, False, True),
        ("forward", "three-pass", 64, 7, 3, True, False),
        ("forward", "tf32", 64, 7, 4, False, False),
        ("unfused", "half", 64, 7, 2, False, False),
    ],
)
def test_rows_are_read_whole_where_few_columns_lie_between(task, product, depth, kernel, dilation, by_pointer, whole):
    assert plan.undivided(task, product, depth, kernel, dilation, by_pointer) == whole


def distinct_shapes() -> list[plan.Plan]:
    """A plan for each tile and block in the table; the interpreter knows nothing of the rest."""
    shapes = {(row.plan.tile, row.plan.block): row.plan for *_, row in plan.plans()}
    return [shapes[key] for key in sorted(shapes)]


def assert_plan_is_right(depth: int, kernel: tuple[int, int], dtype: torch.dtype, planes: bool, device: str) -> None:
    """Output, log-sum-exp and gradients against the reference, on a map of several tiles each way and a remainder."""
    generator = torch.Generator().manual_seed(0)
    heads = 2 if device == "cuda" else 1
    shape = (1, heads * depth, *((19, 40) if device == "cuda" else (9, 24)))
    maps = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
    if not planes:
        maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    results = {}
    for backend in ("triton", "reference"):
        q, k, v = (x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in maps[:3])
        out, lse = local_attention(
            q, k, v, kernel, heads=heads, scale=None, border="mask", return_lse=True, backend=backend
        )
        grads = torch.autograd.grad([out, lse], [q, k, v], [maps[3], torch.ones_like(lse)])
        results[backend] = out, lse, *grads
    # Of the same rounding as half precision allows: this finds wrong tiles, test_accuracy.py judges the budgets.
    tolerance = 3e-2 if dtype.itemsize == 2 else 1e-4
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), *results.values(), strict=True):
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.skipif(CUDA, reason="the GPU runs every row of the table")
@pytest.mark.parametrize("shape", distinct_shapes(), ids=lambda p: f"{p.tile[0]}x{p.tile[1]}-{p.block}")
@pytest.mark.parametrize("planes", [False, True])
def test_every_tile_and_block(shape, planes, monkeypatch):
    if planes and shape.tile[1] < 4:
        pytest.skip("columns side by side want whole vectors")
    monkeypatch.setattr(launch.plan, "INTERPRETED", shape)
    assert_plan_is_right(3, (3, 6), torch.float32, planes, "cpu")


@pytest.mark.skipif(CUDA, reason="what an interpreter shows")
@pytest.mark.parametrize("bytes_of_a_strip", [8_000, 24_000])
def test_strips(bytes_of_a_strip, monkeypatch):
    """Rows of tiles are taken in strips of one tile, or of three and a rest."""
    monkeypatch.setattr(launch, "STRIP_BYTES", bytes_of_a_strip)
    monkeypatch.setattr(launch, "WINDOWS_OF_A_STRIP", 0)
    asked, tile_grid = [], launch.tile_grid
    monkeypatch.setattr(launch, "tile_grid", lambda *args: asked.append(tile_grid(*args)) or asked[-1])
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 6, 11, 50, generator=generator, requires_grad=True) for _ in range(3)]
    results = [local_attention(*maps, 3, heads=2, dilation=2, backend=backend) for backend in ("triton", "reference")]
    grads = [torch.autograd.grad(out.square().sum(), maps) for out in results]
    for got, want in zip((results[0], *grads[0]), (results[1], *grads[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert all(len(grid) == 3 and grid[0] > 4 for grid in asked)


def _check_row(job) -> str | None:
    task, product, planes, row = job
    choose = plan.choose
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        plan.choose = lambda name, *rest: row.plan if name == task else choose(name, *rest)
        dtype = torch.bfloat16 if product == "half" else torch.float32
        with native.portable():
            assert_plan_is_right(row.depth, (5, min(row.width, 9)), dtype, planes, "cuda")
    except (AssertionError, RuntimeError) as error:
        return f"{task} {product} {planes} {row}: {error}"
    finally:
        plan.choose = choose
    return None


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_every_plan_on_the_gpu():
    jobs = [job for job in plan.plans() if job[1] != "tf32"]
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count()), maxtasksperchild=1) as pool:
        failures = [failure for failure in pool.imap_unordered(_check_row, jobs, chunksize=1) if failure]
    assert failures == []


@pytest.mark.skipif(CUDA, reason="on a GPU, fp32 is always taken in three passes")
def test_three_passes_are_as_good_as_fp32(monkeypatch):
    """High and low parts lose 2**-24 of each factor, and low times low as much of a product."""
    monkeypatch.setattr(gpu.Gpu, "product", lambda *_: "three-pass")
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 32, 6, 8, generator=generator)
    got = local_similarity(q, k, 3, backend="triton")
    exact = local_similarity(q.double(), k.double(), 3, backend="reference")
    lengths = local_similarity(q.double().abs(), k.double().abs(), 3, backend="reference")
    assert ((got - exact).abs() <= 4 * 2**-24 * lengths).all()
    one_pass = local_similarity(*(x.view(torch.int32).bitwise_and(-0x2000).view(x.dtype) for x in (q, k)), 3)
    assert not ((one_pass - exact).abs() <= 4 * 2**-24 * lengths).all()


@pytest.mark.parametrize(("depth", "tile"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (256, 256)])
def test_depth_is_padded_to_a_power_of_two(depth, tile):
    assert padded(depth) == tile
