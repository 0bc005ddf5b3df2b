"""The native kernels on a CPU, by `emulated`: one plan of each kind and random problems, each within its budget."""

from dataclasses import replace

import pytest
import torch

from conftest import CUDA, Target
from emulated import COMPILER, emulated
from image_local_attention import local_attention
from image_local_attention.kernels import launch as launches
from image_local_attention.kernels import native
from image_local_attention.kernels.native import launch
from image_local_attention.kernels.native.plan import Plan
from image_local_attention.kernels.native.walk import WalkPlan
from problems import for_each
from test_accuracy import AGGREGATE, ATTENTION, SIMILARITY, check
from test_native import heads_for, kinds, row_name
from test_native_gpu import (
    FP32,
    OPERATORS,
    UNFUSED,
    check_infinite_weights_outside,
    check_tf32,
    operator_of,
    problem,
    served_problems,
)
from walked import FUSED, WALKED, walking

pytestmark = [
    pytest.mark.skipif(CUDA, reason="the GPU runs the kernels themselves"),
    pytest.mark.skipif(COMPILER is None, reason="there is no g++"),
]
TRITON = Target("triton", "cpu")


def kinds_and_times() -> list:
    """With late copies each, and with early ones where these overwrite what was read before."""
    late = [pytest.param(job, True, id=f"{row_name(job)}-late") for job in kinds()]
    return late + [pytest.param(job, False, id=f"{row_name(job)}-early") for job in kinds() if job[2].plan.band]


@pytest.mark.parametrize(("job", "late"), kinds_and_times())
def test_plans_are_within_their_budgets(job, late):
    """On maps of several tiles each way and a remainder, whose rows of weights are whole vectors, and are not."""
    task, form, row = job
    heads, layout = heads_for(task, form, row), "contiguous" if form.planes else "channels_last"
    widths = (24,) if form.planes else (19, 24) if task in UNFUSED else (19,)
    judge = check_tf32 if form.product == "tf32" else check
    with native.using(task, row.plan), emulated(late) as ran:
        for width in widths:
            each = problem(heads, row.depth, (11, width), (6, 5), layouts=(layout,) * 4)
            judge(operator_of(task), each, TRITON, torch.bfloat16 if form.product == "half" else FP32)
    assert task in ran


@pytest.mark.parametrize("task", sorted(UNFUSED))
@pytest.mark.parametrize("planes", [False, True], ids=["rows", "planes"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP32], ids=["bf16", "fp32"])
def test_units_of_a_warp_and_warps_of_a_unit(task, planes, dtype):
    layouts = ("contiguous" if planes else "channels_last",) * 4
    plans = [Plan((8, 16), 4, 1, 2, units=2), Plan((8, 16), 4, 1, 1, band=2, slots=3, units=2)]
    plans += [Plan((8, 16), 8, 1, 3, band=2 if planes or task == "aggregate_transpose" else 4, slots=2)]
    if task == "similarity":
        plans += [Plan((4, 16), 8, 1, step, band=2, slots=2, shared_by=2) for step in (1, 2)]
        plans += [Plan((8, 16), 8, 1, 1, band=2, slots=3, units=2, shared_by=2)]
    of_plans = [(plan, (9, 6)) for plan in plans]
    of_plans += [(Plan((8, 16), 8, 1, 3), (5, 9))]  # pairs of blocks repeat within the halo, rows below
    for plan, kernel in of_plans:
        with native.using(task, plan), emulated(late=True) as ran:
            check(operator_of(task), problem(1, 32, (11, 24), kernel, layouts=layouts), TRITON, dtype)
        assert task in ran


SHIFTED = Plan((4, 16), 4, 1, 2, shifted=True), Plan((8, 24), 6, 1, 1, band=2, slots=2, units=2, shifted=True)


@pytest.mark.parametrize(("columns", "task"), zip((3, 5, 7), sorted(FUSED), strict=True))
def test_tiles_that_begin_before_the_map(columns, task):
    """By so many columns that halos begin with a vector, on maps of one tile and of several."""
    for i, (held, size) in enumerate(zip(SHIFTED, ((5, 8), (9, 40)), strict=True)):
        each = problem(1, 32, size, (4, columns), batch=2, layouts=("contiguous",) * 4, scale=-0.1 if i else None)
        with native.using(task, held), emulated(late=i == 0) as ran:
            check(ATTENTION, each, TRITON, torch.bfloat16 if i else torch.float16)
        assert task in ran


@pytest.mark.parametrize(("walked", "late"), [(each, i % 2 == 0) for i, each in enumerate(WALKED) if not each[0]])
def test_blocks_that_walk_are_within_their_budgets(walked, late):
    """On maps of three tiles to a block and two, of two, and of one, which leaves a group without any."""
    _, depth, kernel, held = walked
    for size, heads in ((35, 2), 1), ((11, 9), 1), ((5, 3), 2):
        each = problem(heads, depth, size, kernel, batch=heads, causal=(late, False), scale=-0.1 if late else None)
        with walking(held), emulated(late) as ran:
            check(ATTENTION, each, TRITON, torch.float16 if size[0] == 11 else torch.bfloat16)
        assert set(ran) == FUSED


@pytest.mark.parametrize(("walked", "late"), [(each, i % 2 == 0) for i, each in enumerate(WALKED) if each[0]])
def test_blocks_that_walk_over_planes_are_within_their_budgets(walked, late):
    """On maps of several tiles each way and of one; tiles that are alone in turns of three groups too."""
    _, depth, kernel, plan = walked
    alone = replace(plan, groups=3) if plan.abreast == 1 and depth == 64 else plan
    for held, size, count in (plan, (19, 16 * plan.abreast), 1), (alone, (6, 8), 2):
        options = {"causal": (False, late), "scale": -0.1 if late else None, "batch": count}
        layouts = ("chunk" if late else "contiguous",) * 3
        each = problem(count, depth, size, kernel, layouts=(*layouts, "contiguous"), **options)
        with walking(held), emulated(late) as ran:
            check(ATTENTION, each, TRITON, torch.float16 if late else torch.bfloat16)
        assert set(ran) == FUSED


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_heads_with_room_for_more_channels_do_not_see_those_of_others(late):
    """Nor write there: a head of NaN leaves its neighbours as they are."""
    maps = [torch.randn(2, 3 * 30, 6, 24, dtype=torch.bfloat16) for _ in range(4)]
    plan = WalkPlan((4, 16), 2, 8, 3)

    def results() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in maps[:3]]
        with walking(plan), emulated(late) as ran:
            out = local_attention(*leaves, (3, 5), heads=3, backend="triton")
            grads = torch.autograd.grad(out, leaves, maps[3])
        assert set(ran) == FUSED
        return [x.detach().unflatten(1, (3, 30)) for x in (out, *grads)]

    before = results()
    for x in maps:
        x.unflatten(1, (3, 30))[:, 1] = torch.nan
    for x, y in zip(results(), before, strict=True):
        assert torch.equal(x[:, ::2], y[:, ::2])
        assert x[:, 1].isnan().all()


# What is left to Triton runs under its interpreter, which has no bf16.
@pytest.mark.hunt
@pytest.mark.parametrize("dtype", [torch.float16, FP32], ids=["fp16", "fp32"])
@OPERATORS
def test_random_problems(operator, tasks, dtype):
    name = f"emulated {operator.inputs} {dtype}"
    with emulated(late=False) as ran:
        for_each(served_problems(dtype), 5, name, lambda each: check(operator, each, TRITON, dtype))
    assert set(ran) == tasks


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP32], ids=["bf16", "fp16", "fp32"])
def test_weights_of_keys_outside_of_the_map_are_not_read(layout, dtype):
    with emulated(late=False) as ran:
        check_infinite_weights_outside(layout, dtype, TRITON)
    assert set(ran) == {"aggregate", "aggregate_transpose"}


@pytest.mark.parametrize("operator", [SIMILARITY, AGGREGATE], ids=["similarity", "aggregate"])
def test_weights_that_do_not_lie_in_a_row_are_left_to_triton(operator):
    """As are gradients of weights that do not."""
    each = problem(1, 16, (5, 8), (3, 3), weight_layout="transposed")
    with emulated(late=False) as ran:
        check(operator, each, TRITON, torch.float16)
    assert set(ran) == {"similarity"}


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(("depth", "spread"), [(32, 10.0), (16, 30.0), (16, 100.0), (64, 100.0)])
def test_gradients_of_large_logits(depth, spread, layout):
    """A forward and the gradients agree on logits, to more than what these are known to."""
    with emulated(late=False) as ran:
        for seed in range(2):
            each = problem(1, depth, (9, 16), (5, 5), spread=spread, layouts=(layout,) * 4, seed=seed)
            check(ATTENTION, each, TRITON, FP32)
    assert set(ran) == FUSED


@pytest.mark.parametrize("largest", [1e4, 1e8, 1e12])
def test_logits_so_large_that_one_key_has_all_the_weight(largest):
    """Raw numbers at the default scale."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 16, 9, 16, generator=generator) for _ in range(4)]
    results = []
    with emulated(late=False) as ran:
        for backend in "triton", "tiled":
            leaves = [
                (x * scale).requires_grad_() for x, scale in zip(maps, (largest**0.5, largest**0.5, 1), strict=False)
            ]
            out = local_attention(*leaves, 3, backend=backend)
            results.append((out.detach(), *torch.autograd.grad(out, leaves, maps[3])))
    assert set(ran) == FUSED
    (out, *_, grad_value), (exact, *_, exact_grad_value) = results
    torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_value, exact_grad_value, rtol=1e-4, atol=1e-4)
    assert all(x.isfinite().all() for x in results[0])


@pytest.mark.parametrize("bytes_of_a_strip", [75_000, 150_000])
def test_strips(bytes_of_a_strip, monkeypatch):
    """Of one tile of two, and of two of three, where heads share no block."""
    monkeypatch.setattr(launches, "STRIP_BYTES", bytes_of_a_strip)
    monkeypatch.setattr(launches, "WINDOWS_OF_A_STRIP", 0)
    with emulated(late=False) as ran:
        check(ATTENTION, problem(3, 32, (19, 37), (3, 3), batch=2), TRITON, FP32)
    assert set(ran) == FUSED


@pytest.mark.parametrize("of_query", [True, False])
def test_gradients_of_key_and_value_wait_for_delta_alone_after_that_of_the_query(of_query, monkeypatch):
    """And only then: before another kernel of delta, any may have made the maps."""
    launched = []

    def spy(self, maps, *numbers):
        launched.append(numbers[-1] is True)
        return call(self, maps, *numbers)

    call = launch.Native.__call__
    monkeypatch.setattr(launch.Native, "__call__", spy)
    with emulated(late=False) as ran:
        check(ATTENTION, problem(2, 32, (9, 13), (3, 5), wanted=(of_query, True, True, False)), TRITON, FP32)
    assert launched == ([False, False, True] if of_query else [False, False])
    assert set(ran) == (FUSED if of_query else FUSED - {"grad_query"})


@pytest.mark.parametrize("scale", [1e-6, 2.0**50, -0.7])
def test_scales(scale):
    with emulated(late=False) as ran:
        for dtype in torch.bfloat16, FP32:
            check(ATTENTION, problem(2, 16, (5, 9), (3, 5), scale=scale), TRITON, dtype)
    assert set(ran) == FUSED
