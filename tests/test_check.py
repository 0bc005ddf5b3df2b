"""Every argument of every public function: what is wrong with it is told by name, before any work.

Each row gives a wrong value for one argument, the error, and words of its message beside the argument's name: what
came or what was wanted.
"""

import inspect

import numpy as np
import pytest
import torch

from image_local_attention import local_aggregate, local_attention, local_similarity, ops

B, C, H, W = 2, 8, 5, 6
FUNCTIONS = {f.__name__: f for f in (local_attention, local_similarity, local_aggregate)}


def zeros(*shape: int, **kind) -> torch.Tensor:
    return torch.zeros(shape, **kind)


def good(function: str) -> dict:
    """Arguments that are right, in which one at a time goes wrong."""
    arguments = {"query": zeros(B, C, H, W), "key": zeros(B, C, H, W), "value": zeros(B, 4, H, W)}
    arguments |= {"weight": zeros(B, 2, H, W, 15), "kernel_size": (3, 5), "heads": 2}
    return {name: x for name, x in arguments.items() if name in inspect.signature(FUNCTIONS[function]).parameters}


def wrong_map(channels: int) -> list:
    """What any map may be: rows of (value, error, words)."""
    return [
        (None, TypeError, "NoneType"),
        (np.zeros((B, channels, H, W)), TypeError, "ndarray"),
        ([[0.0]], TypeError, "list"),
        (zeros(B, channels, H, W, dtype=torch.int64), TypeError, "torch.int64"),
        (zeros(B, channels, H, W, dtype=torch.complex64), TypeError, "torch.complex64"),
        (zeros(B, channels, H, W, dtype=torch.bool), TypeError, "torch.bool"),
        (zeros(B, channels, H, W).to_sparse(), TypeError, "layout torch.sparse_coo"),
        (zeros(channels, H, W), ValueError, f"({channels}, {H}, {W})"),
        (zeros(B, channels, H, W, 1), ValueError, "5 dimensions"),
        (zeros(B, 0, H, W), ValueError, f"({B}, 0, {H}, {W})"),
        (zeros(B, channels + 1, H, W), ValueError, f"got {channels + 1}"),
    ]


def unlike_map(channels: int) -> list:
    """What a map may be that another map came before."""
    return [
        (zeros(B, channels, H, W, dtype=torch.float64), TypeError, "torch.float64"),
        (zeros(B, channels, H, W, device="meta"), TypeError, "meta"),
        (zeros(B + 1, channels, H, W), ValueError, f"got {B + 1}"),
        (zeros(1, channels, H, W), ValueError, "got 1"),
        (zeros(B, channels, H + 1, W), NotImplementedError, f"got ({H + 1}, {W})"),
        (zeros(B, channels, H, 1), NotImplementedError, f"got ({H}, 1)"),
    ]


COMMON = {
    "kernel_size": [
        (0, ValueError, "0"),
        (-3, ValueError, "-3"),
        ((3, 0), ValueError, "(3, 0)"),
        ((3, 5, 7), ValueError, "(3, 5, 7)"),
        ((), ValueError, "()"),
        (3.0, TypeError, "3.0"),
        ((3, 5.0), TypeError, "(3, 5.0)"),
        (True, TypeError, "True"),
        ("3", TypeError, "'3'"),
        (None, TypeError, "None"),
    ],
    "heads": [
        (0, ValueError, "0"),
        (-2, ValueError, "-2"),
        (3, ValueError, "multiple of heads=3"),
        (2.0, TypeError, "2.0"),
        (True, TypeError, "True"),
        (None, TypeError, "None"),
    ],
    "kv_heads": [
        (0, ValueError, "0"),
        (4, ValueError, "kv_heads=4"),
        (1.0, TypeError, "1.0"),
        (True, TypeError, "True"),
        (1, NotImplementedError, "1"),
    ],
    "scale": [
        ("1", TypeError, "'1'"),
        (True, TypeError, "True"),
        (1j, TypeError, "1j"),
        (torch.tensor(1.0), TypeError, "tensor"),
        (float("nan"), ValueError, "nan"),
        (float("inf"), ValueError, "inf"),
    ],
    "border": [
        ("edge", ValueError, "'edge'"),
        ("", ValueError, "''"),
        (("zeros", "edge"), ValueError, "'edge'"),
        (None, TypeError, "None"),
        (0, TypeError, "0"),
        (("zeros", 0), TypeError, "0"),
        (("zeros", "zeros", "zeros"), TypeError, "pair"),
        ((), TypeError, "pair"),
        *((name, NotImplementedError, name) for name in ("shift", "reflect", "replicate", "circular")),
        (("zeros", "mask"), NotImplementedError, "per axis"),
    ],
    "dilation": [
        (0, ValueError, "0"),
        ((1, -1), ValueError, "-1"),
        (1.0, TypeError, "1.0"),
        (None, TypeError, "None"),
        (2, NotImplementedError, "2"),
        ((1, 2), NotImplementedError, "(1, 2)"),
    ],
    "causal": [
        ("rows", ValueError, "'rows'"),
        (1, TypeError, "1"),
        (None, TypeError, "None"),
        ((True, False, False), TypeError, "(True, False, False)"),
        (True, NotImplementedError, "True"),
        ((False, True), NotImplementedError, "(False, True)"),
        ("raster", NotImplementedError, "'raster'"),
    ],
    "bias": [([[0.0]], TypeError, "list"), (0.0, TypeError, "float"), (zeros(2, 15), NotImplementedError, "(2, 15)")],
    "key_mask": [
        (True, TypeError, "bool"),
        (zeros(B, H, W, dtype=torch.bool), NotImplementedError, f"({B}, {H}, {W})"),
    ],
    "return_lse": [(1, TypeError, "1"), (None, TypeError, "None"), ("yes", TypeError, "'yes'")],
    "backend": [
        ("cuda", ValueError, "'cuda'"),
        ("", ValueError, "''"),
        (0, TypeError, "0"),
        (("triton",), TypeError, "('triton',)"),
    ],
}
MAPS = {
    "local_attention": {
        "query": wrong_map(C),
        "key": wrong_map(C) + unlike_map(C),
        "value": wrong_map(4) + unlike_map(4),
    },
    "local_similarity": {"query": wrong_map(C), "key": wrong_map(C) + unlike_map(C)},
    "local_aggregate": {
        "weight": [
            (None, TypeError, "NoneType"),
            (zeros(B, 2, H, W, 15, dtype=torch.int32), TypeError, "torch.int32"),
            (zeros(B, 2, H, W, 15, dtype=torch.float16), TypeError, "torch.float16"),
            (zeros(B, 2, H, W, 15, device="meta"), TypeError, "meta"),
            (zeros(B, H, W, 15), ValueError, "4 dimensions"),
            (zeros(B, 2, H, W, 3, 5), ValueError, "6 dimensions"),
            (zeros(B + 1, 2, H, W, 15), ValueError, "batch"),
            (zeros(B, 1, H, W, 15), ValueError, "got 1"),
            (zeros(B, 2, H, W, 9), ValueError, "got 9"),
            (zeros(B, 2, H, W + 1, 15), NotImplementedError, f"got ({H}, {W + 1})"),
            (zeros(B, 2, H, W, 15).to_sparse(), TypeError, "layout torch.sparse_coo"),
        ],
        "value": wrong_map(4),
    },
}
CASES = [
    pytest.param(function, name, *case, id=f"{function}-{name}-{i}")
    for function, callee in FUNCTIONS.items()
    for name, cases in (COMMON | MAPS[function]).items()
    if name in inspect.signature(callee).parameters
    for i, case in enumerate(cases)
]


@pytest.fixture
def no_work(monkeypatch):
    """Operators must not run."""
    for name in ("attention", "similarity", "aggregate"):
        monkeypatch.setattr(ops, name, lambda *args, name=name: pytest.fail(f"{name} ran"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("function", "name", "value", "error", "words"), CASES)
def test_a_wrong_argument_is_told_by_name(function, name, value, error, words):
    with pytest.raises(error) as caught:
        FUNCTIONS[function](**good(function) | {name: value})
    message = str(caught.value)
    assert caught.type is error
    assert name in message
    assert words in message
    assert "got" in message or "carries" in message


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_table_covers_every_argument(function):
    assert set(inspect.signature(FUNCTIONS[function]).parameters) <= set(COMMON | MAPS[function])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_the_table_starts_from_is_right(function):
    FUNCTIONS[function](**good(function), backend="reference")


RIGHT = {
    "kernel_size": [1, 3, (3, 5), [3, 5], torch.Size((3, 5)), (99, 1)],
    "heads": [1, 2, 4],
    "kv_heads": [None, 2],
    "scale": [None, 0, 0.0, -1, 2.5, np.float32(0.5), np.float64(0.5)],
    "border": ["zeros", "mask", ("mask", "mask"), ["zeros", "zeros"]],
    "dilation": [1, (1, 1), [1, 1]],
    "causal": [False, (False, False), [False, False]],
    "bias": [None],
    "key_mask": [None],
    "return_lse": [False, True],
    "backend": [None, "reference", "tiled"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in RIGHT.items() for value in values])
def test_a_right_argument_is_taken(name, value):
    arguments = good("local_attention") | {name: value}
    results = local_attention(**arguments)
    out = results[0] if name == "return_lse" and value else results
    assert out.shape == (B, 4, H, W)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("options", range(3, 6))
def test_options_go_by_name(function, options):
    """Behind the kernel size, arguments that are given by position are refused."""
    with pytest.raises(TypeError, match="positional"):
        FUNCTIONS[function](*(0,) * (len(good(function)) + options))


def test_a_demanded_backend_that_cannot_run_says_why():
    maps = [zeros(1, 4, 3, 3, dtype=torch.float64)] * 3
    with pytest.raises(ValueError, match=r"backend='triton'.*float64"):
        local_attention(*maps, 3, backend="triton")
    deep = [zeros(1, 257, 3, 3)] * 3
    with pytest.raises(ValueError, match=r"backend='triton'.*(257 channels|not installed|GPU)"):
        local_attention(*deep, 3, backend="triton")


def test_mixed_dtypes_are_wrong_unless_autocast_unites_them():
    query, key, value = zeros(1, 4, 3, 3), zeros(1, 4, 3, 3), zeros(1, 4, 3, 3, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"value.*torch.float32.*torch.bfloat16"):
        local_attention(query, key, value, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert local_attention(query, key, value, 3).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"value.*torch.float64"):
            local_attention(query, key, value.double(), 3)
