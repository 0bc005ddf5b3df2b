"""Window geometry, against sets of pixels that are counted out, and the oracle's windows."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import oracle
from image_local_attention.window import BORDERS, FOLDING, OUTSIDE, Axis, Window

# Axes whose windows slide, and axes of every kind, whether or not their border serves them.
sliding = st.builds(Axis, kernel=st.integers(1, 12), size=st.integers(1, 12), border=st.sampled_from(("zeros", "mask")))
few = st.integers(1, 9)
axes = st.builds(
    Axis,
    kernel=few,
    size=few,
    border=st.sampled_from(BORDERS),
    dilation=st.sampled_from((1, 1, 2, 3)),
    causal=st.booleans(),
    queries=st.none() | st.integers(1, 12),
)


def reach(axis: Axis) -> tuple[int, int]:
    """Pixels that some window reaches past either end of the map."""
    starts = [axis.start(query) for query in range(axis.query_count)]
    return max(0, -min(starts)), max(0, max(starts) + axis.dilation * (axis.kernel - 1) - (axis.size - 1))


def serves(axis: Axis) -> bool:
    """Whether the border is defined for such windows."""
    if axis.causal and axis.border in FOLDING:
        return False
    if axis.border == "shift" and not axis.causal:
        return axis.kernel * axis.dilation <= axis.size
    most = {"reflect": axis.size - 1, "circular": axis.size}.get(axis.border, 10**9)
    return max(reach(axis)) <= most


served = axes.filter(serves)


def seen(axis: Axis, query: int) -> set[int]:
    """Where windows slide."""
    return set(range(query - axis.kernel // 2, query - axis.kernel // 2 + axis.kernel))


@settings(max_examples=60)
@given(sliding, st.integers(0, 20), few)
def test_keys_are_those_that_some_query_sees(axis, first, count):
    assert axis.sliding
    assert set(axis.keys(first, count)) == set().union(*(seen(axis, q) for q in range(first, first + count)))


@settings(max_examples=300)
@given(served)
def test_a_slot_is_one_key_of_every_query(axis):
    for i in range(axis.kernel):
        positions = [axis.start(query) + axis.dilation * i for query in range(axis.query_count)]
        assert axis.slot(i) == tuple(axis.fold(position) for position in positions)


@pytest.mark.parametrize(("kernel", "start", "last"), [(1, 10, 10), (2, 9, 10), (3, 9, 11), (4, 8, 11), (7, 7, 13)])
def test_even_windows_lean_to_the_top_left(kernel, start, last):
    assert Axis(kernel, 20).keys(10, 1) == range(start, last + 1)
    assert Axis(kernel, 20, dilation=2).start(10) == 10 - 2 * (10 - start)


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12))
def test_the_centre_is_the_key_that_the_middle_of_the_query_falls_into(size, queries):
    axis = Axis(3, size, queries=queries)
    middles = [(query + 0.5) * size / queries for query in range(queries)]
    assert [axis.centre(query) for query in range(queries)] == [int(middle + 1e-9) for middle in middles]
    assert [Axis(3, size).centre(query) for query in range(size)] == list(range(size))


@pytest.mark.parametrize(
    ("queries", "size", "centres"),
    [
        (6, 3, [0, 0, 1, 1, 2, 2]),
        (3, 6, [1, 3, 5]),
        (2, 5, [1, 3]),
        (5, 2, [0, 0, 1, 1, 1]),
        (1, 4, [2]),
        (3, 1, [0] * 3),
    ],
)
def test_grids_of_two_sizes_are_aligned(queries, size, centres):
    axis = Axis(1, size, queries=queries)
    assert [axis.centre(query) for query in range(queries)] == centres
    assert axis.slot(0) == tuple(centres)


@settings(max_examples=300)
@given(axes)
def test_a_causal_window_ends_at_the_query_and_does_not_shift(axis):
    axis = dataclasses.replace(axis, causal=True)
    assert not axis.shifts
    for query in range(axis.query_count):
        assert axis.start(query) + axis.dilation * (axis.kernel - 1) == axis.centre(query)


@settings(max_examples=300)
@given(axes)
def test_shifted_windows_are_the_nearest_within_the_residue_that_lie_in_the_map(axis):
    axis = dataclasses.replace(axis, border="shift", causal=False)
    assume(serves(axis))
    assert axis.shifts
    assert axis.overhang == (0, 0)
    for query in range(axis.query_count):
        centre, start = axis.centre(query), axis.start(query)
        wanted = centre - axis.dilation * (axis.kernel // 2)
        last = axis.size - axis.dilation * (axis.kernel - 1)
        possible = [s for s in range(last) if s % axis.dilation == centre % axis.dilation]
        assert start == min(possible, key=lambda s: abs(s - wanted))


@pytest.mark.parametrize("border", FOLDING)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_folding_continues_the_map_as_torch_pads_it(border, size):
    most = {"reflect": size - 1, "circular": size, "replicate": 3 * size}[border]
    axis = Axis(1, size, border)
    padded = torch.nn.functional.pad(torch.arange(size, dtype=torch.float64).view(1, 1, size), (most, most), border)
    assert [axis.fold(position) for position in range(-most, size + most)] == padded.flatten().int().tolist()


@pytest.mark.parametrize("border", ["zeros", "mask", "shift"])
def test_other_maps_end(border):
    axis = Axis(3, 4, border)
    assert [axis.fold(position) for position in range(-2, 6)] == [OUTSIDE, OUTSIDE, 0, 1, 2, 3, OUTSIDE, OUTSIDE]
    assert axis.outside_is_absent == (border != "zeros")


@settings(max_examples=300)
@given(axes)
def test_the_overhang_is_how_far_windows_reach_over_the_map(axis):
    assume(axis.border != "shift" or serves(axis))
    assert axis.overhang == reach(axis)


@pytest.mark.parametrize(("size", "queries"), [(0, None), (0, 3), (3, 0), (0, 0)])
def test_without_keys_or_queries_nothing_reaches_over(size, queries):
    assert Axis(5, size, "reflect", queries=queries).overhang == (0, 0)


@st.composite
def windows(draw):
    """A window that its borders serve, the size of the map and that of the queries' grid."""
    y, x = draw(served), draw(served)
    plain = not (y.causal or x.causal) and {y.border, x.border} <= {"zeros", "mask"}
    raster = plain and draw(st.booleans())
    pairs = [(getattr(y, name), getattr(x, name)) for name in ("kernel", "border", "dilation", "causal")]
    return Window(*pairs, raster), (y.size, x.size), (y.query_count, x.query_count)


@settings(max_examples=250)
@given(windows())
def test_windows_are_those_of_the_oracle(problem):
    window, size, queries = problem
    rows, columns = window.axes(size, queries)
    (kh, kw), slots = window.kernel, [divmod(n, window.kernel[1]) for n in range(window.slots)]
    causal = "raster" if window.raster else window.causal
    for y, x, want in oracle.windows(size, window.kernel, window.border, window.dilation, causal, queries):
        keys = [(rows.slot(i)[y], columns.slot(j)[x]) for i, j in slots]
        absent = [
            window.dropped(i, j)
            or (key_y == OUTSIDE and rows.outside_is_absent)
            or (key_x == OUTSIDE and columns.outside_is_absent)
            for (i, j), (key_y, key_x) in zip(slots, keys, strict=True)
        ]
        assert np.array_equal(~np.array(absent), want.takes_part)
        found = [(*key, n) for n, key in enumerate(keys) if OUTSIDE not in key and not absent[n]]
        assert found == list(zip(want.ys, want.xs, want.slots, strict=True))
        displaced = [(rows.displacement(y) + i) * (2 * kw - 1) + columns.displacement(x) + j for i, j in slots]
        assert np.array_equal(displaced, want.displaced)
        assert 0 <= min(displaced) <= max(displaced) < (2 * kh - 1) * (2 * kw - 1)


def test_raster_drops_what_comes_after_the_query():
    window = Window((3, 4), ("mask", "mask"), raster=True)
    dropped = [[window.dropped(i, j) for j in range(4)] for i in range(3)]
    assert dropped == [[False] * 4, [False, False, False, True], [True] * 4]
    assert not any(Window((3, 4)).dropped(i, j) for i in range(3) for j in range(4))


def test_axes_take_what_is_theirs():
    window = Window((3, 4), ("mask", "shift"), (2, 1), (True, False))
    assert window.axes((7, 8), (9, 8)) == (Axis(3, 7, "mask", 2, True, 9), Axis(4, 8, "shift", 1, False, 8))
    assert window.axes((7, 8)) == (Axis(3, 7, "mask", 2, True), Axis(4, 8, "shift", 1, False))
    assert window.slots == 12


def test_windows_and_axes_are_frozen_values():
    options = ("mask", "shift"), (1, 2), (True, False)
    assert Window((3, 5), *options) == Window((3, 5), *options) != Window((3, 5))
    assert hash(Window((3, 5), *options)) == hash(Window((3, 5), *options))
    assert len({Axis(3, 5), Axis(3, 5), Axis(3, 5, causal=True)}) == 2
    for value, name in ((Window((3, 5)), "kernel"), (Axis(3, 5), "size")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, (1, 1))
