"""Tables of biases and key masks: what they hold, and that no load of a tile goes past their frames."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conftest import CUDA

pytest.importorskip("triton")
import triton
import triton.language as tl

from image_local_attention.kernels import plan
from image_local_attention.kernels.geometry import key_halo, query_halo
from image_local_attention.kernels.launch import Launch, Problem
from image_local_attention.kernels.table import ceiling, load_entries, table
from image_local_attention.kernels.terms import first_entry
from image_local_attention.rules import Rules
from image_local_attention.window import Window
from problems import causality, largest_kernel, windows

DEVICE = "cuda" if CUDA else "cpu"
SHAPES = ((4, 4), (4, 8), (8, 4), (8, 8), (16, 4), (4, 16), (2, 16))
NAMES = "TH", "TW", "ROWS", "COLS", "SHIFT", "PAD", "ALIGN"


def entries(launch: Launch, problem: Problem) -> list[int]:
    """Entries of a bias on each axis."""
    return [2 * span.kernel - 1 if problem.rules.by_displacement else span.kernel for span in launch.spans]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("margins", [(0, 0), (1, 4), (7, 2)], ids=str)
def test_a_bias_is_minus_infinity_around(margins, dtype):
    bias = torch.randn(3, 5, 4, device=DEVICE).to(dtype).transpose(1, 2)
    framed = table(bias, margins)
    assert torch.equal(framed, bias.float())
    y, x = margins
    whole = framed.as_strided((3, 4 + 2 * y, 5 + 2 * x), framed.stride(), 0)
    assert whole.numel() * whole.element_size() == framed.untyped_storage().nbytes()
    wanted = torch.nn.functional.pad(bias.float(), (x, x, y, y), value=float("-inf"))
    assert torch.equal(whole, wanted)


def test_a_ceiling_lets_all_keys_around_the_map_in():
    mask = torch.rand(2, 7, 5, device=DEVICE).transpose(1, 2) < 0.5
    most = ceiling(mask.view(torch.uint8)[:, None, ..., None].expand(-1, 3, -1, -1, -1), (2, 3))
    assert most.shape == (2, 3, 5, 7, 1)
    assert most.stride(1) == 0
    whole = most.as_strided((2, 9, 13), (most.stride(0), *most.stride()[2:4]), 0)
    wanted = torch.nn.functional.pad(mask, (3, 3, 2, 2), value=True)
    assert torch.equal(whole, torch.where(wanted, float("inf"), float("-inf")))


@triton.jit
def entries_kernel(
    table_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, TW: tl.constexpr, COLS: tl.constexpr,
    SIGN: tl.constexpr, ROW: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    b_x = load_entries(table_ptr, M, N, TW, COLS, SIGN, ROW, WARPS)
    tl.store(out_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], b_x)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("warps", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("tile", "block"), [((4, 4), (2, 8)), ((2, 4), (2, 8)), ((4, 8), (2, 8)), ((8, 8), (4, 16)), ((16, 4), (1, 32))]
)
def test_an_entry_is_at_the_distance_of_its_pixels(tile, block, warps, sign):
    (m, n), row = (tile[0] * tile[1], block[0] * block[1]), 97
    numbers = torch.arange(row * 64, dtype=torch.float32, device=DEVICE)
    first = 20 * row + 40
    got = torch.empty(m, n, device=DEVICE)
    constants = {"TW": tile[1], "COLS": block[1], "SIGN": sign, "ROW": row, "WARPS": warps}
    entries_kernel[(1,)](numbers[first:], got, m, n, **constants, num_warps=warps)
    of_tile, of_block = (
        torch.tensor([i // cols * row + i % cols for i in range(size)])
        for size, cols in ((m, tile[1]), (n, block[1]))
    )  # fmt: skip
    assert torch.equal(got.cpu().long(), first + sign * (of_block[None, :] - of_tile[:, None]))


@triton.jit
def reach_kernel(
    out_ptr, size, queries, TILE: tl.constexpr, STEP: tl.constexpr, SHIFT: tl.constexpr, PAD: tl.constexpr,
    ALIGN: tl.constexpr, BY_DISPLACEMENT: tl.constexpr, TRANSPOSED: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """For each tile of an axis: the least and the last key that is loaded, and the least and the last entry."""
    i = tl.program_id(0)
    p0 = i * TILE - SHIFT
    if TRANSPOSED:
        first, count = query_halo(p0, p0 + TILE - 1, size, queries, TILE, STEP, PAD, ALIGN, A)
        first_key, last_key = p0, p0 + TILE - 1
        low = p0 - first_entry(first + count * STEP - 1, size, queries, BY_DISPLACEMENT, A)
        high = p0 + TILE - 1 - first_entry(first, size, queries, BY_DISPLACEMENT, A)
    else:
        first, count = key_halo(p0, size, queries, TILE, STEP, PAD, ALIGN, A)
        first_key, last_key = first, first + count * STEP - 1
        low = first - first_entry(p0 + TILE - 1, size, queries, BY_DISPLACEMENT, A)
        high = last_key - first_entry(p0, size, queries, BY_DISPLACEMENT, A)
    tl.store(out_ptr + 5 * i, count)
    tl.store(out_ptr + 5 * i + 1, first_key)
    tl.store(out_ptr + 5 * i + 2, last_key)
    tl.store(out_ptr + 5 * i + 3, low)
    tl.store(out_ptr + 5 * i + 4, high)


@st.composite
def launches(draw) -> tuple[Launch, Problem, bool]:
    """Launches of every window with a bias and a mask, maps of both layouts, and every shape of tile and block."""
    size = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    window = draw(windows(size, 40))
    limits = largest_kernel(**window, size=size, largest=40)
    kernel = tuple(draw(st.integers(1, min(limit, 13))) for limit in limits)
    keys, causal = window["keys"] or size, window["causal"]
    displacement = "shift" in window["border"] and draw(st.booleans())
    shape = [2 * k - 1 for k in kernel] if displacement else [kernel[0] * kernel[1]]
    geometry = Window(kernel, window["border"], window["dilation"], causality(causal), raster=causal == "raster")
    rules = Rules(geometry, bias=torch.zeros(1, *shape), key_mask=torch.ones(1, *keys, dtype=torch.bool))
    transposed, channels_last = draw(st.booleans()), draw(st.booleans())
    problem = Problem(rules, 1, 1, size, keys, until_query=draw(st.booleans()) and not transposed)
    at_queries, at_keys = (
        torch.zeros(1, 1, h, w, 16) if channels_last else torch.zeros(1, 1, 16, h, w).permute(0, 1, 3, 4, 2)
        for h, w in (size, keys)
    )
    kept, streamed = (at_keys, at_queries) if transposed else (at_queries, at_keys)
    chosen = plan.Plan(draw(st.sampled_from(SHAPES)), draw(st.sampled_from((16, 32, 64))), 1)
    assume(channels_last or chosen.tile[1] >= 4)
    usual, plan.INTERPRETED = plan.INTERPRETED, chosen
    try:
        launch = Launch("forward", (kept,), (streamed,), problem, (1, 1, *kept.shape[2:4]), transposed)
    finally:
        plan.INTERPRETED = usual
    return launch, problem, transposed


@pytest.mark.skipif(CUDA, reason="asks the interpreter where halos lie")
@settings(max_examples=80)
@given(launches())
def test_no_tile_reaches_past_a_frame(given_launch):
    launch, problem, transposed = given_launch
    (bias, mask), constants = launch.framed(problem)
    th, tw, rows, cols, *begins = (launch.constants[name] for name in NAMES)
    for axis, (tile, step, shift, pad, align) in enumerate(((th, rows, 0, 0, 1), (tw, cols, *begins))):
        span, lattice = launch.spans[axis], launch.spans[axis].lattice
        for residue in range(lattice):
            queries, keys = (len(range(residue, n, lattice)) for n in (problem.sizes[axis], problem.sizes[2 + axis]))
            kept = keys if transposed else queries
            tiles = triton.cdiv(kept + shift, tile)
            if not kept or not keys or not queries:
                continue
            found = torch.empty(tiles, 5, dtype=torch.int32)
            reach_kernel[(tiles,)](
                *(found, keys, queries, tile, step, shift, pad, align),
                BY_DISPLACEMENT=problem.rules.by_displacement,
                TRANSPOSED=transposed,
                A=span,
            )
            for count, first, last, low, high in found.tolist():
                if count <= 0:
                    continue
                if not transposed:
                    before, after = frame(mask[0, 0, :, :, 0], axis)
                    assert first * lattice >= -before
                    assert last * lattice + residue < problem.sizes[2 + axis] + after
                if constants["ROW"]:
                    before, after = frame(bias[0], axis)
                    assert low >= -before
                    assert high < entries(launch, problem)[axis] + after


def frame(x: torch.Tensor, axis: int) -> tuple[int, int]:
    """How many rows, or columns, of a table lie before and after the view of what it holds."""
    row = x.stride(0)
    storage = x.untyped_storage().nbytes() // x.element_size()
    before = divmod(x.storage_offset(), row)
    size = (storage // row - x.shape[0] - before[0], row - x.shape[1] - before[1])
    return before[axis], size[axis]
