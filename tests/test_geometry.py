"""Spans, what kernels are compiled for of a window, against pixels that are counted out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from image_local_attention.kernels.geometry import spans
from image_local_attention.kernels.launch import Problem
from image_local_attention.rules import Rules
from image_local_attention.window import Axis, Window
from test_window import few, seen, sliding


def span_of(axis: Axis):
    return spans(Window((axis.kernel,) * 2), (axis, axis))[0]


@settings(max_examples=60)
@given(sliding, st.integers(-5, 20))
def test_the_first_query_that_sees_a_key(axis, key):
    span = span_of(axis)
    assert key + span.lead - (span.reach - 1) == min(q for q in range(-40, 60) if key in seen(axis, q))


@settings(max_examples=60)
@given(few)
def test_leads_are_the_overhang_on_the_left(kernel):
    axis = Axis(kernel, 1)
    span = span_of(axis)
    assert span.lead == -min(seen(axis, 0))
    assert span.reach - 1 - span.lead == -min(q for q in range(-20, 20) if 0 in seen(axis, q))


PLAIN = [
    (Window((3, 4)), (5, 6), (5, 6), True),
    (Window((3, 4), ("mask", "mask")), (5, 6), (5, 6), True),
    (Window((9, 1), ("mask", "mask")), (2, 2), (2, 2), True),
    (Window((3, 4), ("zeros", "mask")), (5, 6), (5, 6), True),
    (Window((3, 4), causal=(True, False)), (5, 6), (5, 6), True),
    (Window((3, 4), ("shift", "shift"), causal=(True, True)), (5, 6), (5, 6), True),
    (Window((3, 4), dilation=(1, 2)), (5, 6), (5, 6), True),
    (Window((3, 4), ("mask", "shift")), (5, 6), (5, 6), False),
    (Window((3, 4), ("shift", "shift")), (5, 6), (5, 6), False),
    (Window((3, 3), ("circular", "circular")), (5, 6), (5, 6), False),
    (Window((3, 3), ("mask", "replicate")), (5, 6), (5, 6), False),
    (Window((3, 4), raster=True), (5, 6), (5, 6), False),
    (Window((3, 4)), (5, 6), (5, 3), False),
]


@pytest.mark.parametrize(("window", "size", "queries", "plain"), PLAIN)
def test_plain_windows_slide(window, size, queries, plain):
    assert ("plain" in Problem(Rules(window), 1, 1, queries, size).facts) == plain
