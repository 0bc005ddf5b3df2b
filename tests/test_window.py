"""Window geometry, against sets of pixels that are counted out."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from image_local_attention.window import BORDERS, Axis, Window

axes = st.builds(Axis, kernel=st.integers(1, 12), size=st.integers(1, 12))


def seen(axis: Axis, query: int) -> set[int]:
    return set(range(query - axis.kernel // 2, query - axis.kernel // 2 + axis.kernel))


@settings(max_examples=60)
@given(axes, st.integers(0, 20), st.integers(1, 9))
def test_keys_are_those_that_some_query_sees(axis, first, count):
    assert set(axis.keys(first, count)) == set().union(*(seen(axis, q) for q in range(first, first + count)))


@settings(max_examples=60)
@given(axes, st.integers(0, 20), st.integers(1, 9))
def test_queries_are_those_that_see_some_key(axis, first, count):
    keys = set(range(first, first + count))
    assert set(axis.queries(first, count)) == {q for q in range(-30, 60) if seen(axis, q) & keys}


@settings(max_examples=60)
@given(axes)
def test_a_slot_is_one_key_of_every_query(axis):
    for i in range(axis.kernel):
        assert list(axis.slot(i)) == [axis.start(query) + i for query in range(axis.size)]
        assert all(key in seen(axis, query) for query, key in enumerate(axis.slot(i)))


@pytest.mark.parametrize(("kernel", "start", "last"), [(1, 10, 10), (2, 9, 10), (3, 9, 11), (4, 8, 11), (7, 7, 13)])
def test_even_windows_lean_to_the_top_left(kernel, start, last):
    assert Axis(kernel, 20).keys(10, 1) == range(start, last + 1)


@settings(max_examples=60)
@given(st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_leads_are_the_overhang_on_the_left(kernel):
    window = Window(kernel)
    axis = Axis(kernel[1], 1)
    assert window.lead == -min(seen(axis, 0))
    assert window.query_lead == -min(q for q in range(-20, 20) if 0 in seen(axis, q))


@settings(max_examples=40)
@given(st.tuples(st.integers(1, 6), st.integers(1, 6)), st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_slots_are_those_of_the_oracle(kernel, size):
    rows, columns = Window(kernel).axes(size)
    assert Window(kernel).slots == kernel[0] * kernel[1]
    for y, x, window in oracle.windows(size, kernel, "zeros"):
        keys = {
            i * kernel[1] + j: (rows.slot(i)[y], columns.slot(j)[x]) for i in range(kernel[0]) for j in range(kernel[1])
        }
        inside = {slot: key for slot, key in keys.items() if key[0] in range(size[0]) and key[1] in range(size[1])}
        assert inside == {
            slot: (key_y, key_x) for slot, key_y, key_x in zip(window.slots, window.ys, window.xs, strict=True)
        }


def test_a_window_is_a_frozen_value():
    window = Window((3, 5), "mask")
    assert window == Window((3, 5), "mask") != Window((3, 5))
    assert hash(window) == hash(Window((3, 5), "mask"))
    assert [Window((3, 5), border).masked for border in BORDERS] == [False, True]
    with pytest.raises(dataclasses.FrozenInstanceError):
        window.kernel = (1, 1)
