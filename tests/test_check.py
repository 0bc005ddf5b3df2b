"""Every argument of every public function: what is wrong with it is told by name, before any work.

Each row gives a wrong value for one argument, the error, and words of its message beside the argument's name: what
came or what was wanted. Rows of COMBINED are wrong together. `test_check_layer` is about the layer and `merge`.
"""

import inspect
import math

import numpy as np
import pytest
import torch

from image_local_attention import derivatives, local_aggregate, local_attention, local_similarity, ops
from image_local_attention.window import BORDERS

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
        (3, ValueError, "heads=3"),
        (2.0, TypeError, "2.0"),
        (True, TypeError, "True"),
        (None, TypeError, "None"),
    ],
    "kv_heads": [
        (0, ValueError, "0"),
        (4, ValueError, "got heads=2, kv_heads=4"),
        (1.0, TypeError, "1.0"),
        (True, TypeError, "True"),
        ("1", TypeError, "'1'"),
    ],
    "scale": [
        ("1", TypeError, "'1'"),
        (True, TypeError, "True"),
        (1j, TypeError, "1j"),
        (torch.tensor(1.0), TypeError, "tensor"),
        (float("nan"), ValueError, "nan"),
        (float("inf"), ValueError, "inf"),
        (float("-inf"), ValueError, "-inf"),
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
        (["zeros"], TypeError, "pair"),
        ({"zeros", "mask"}, TypeError, "pair"),
    ],
    "dilation": [
        (0, ValueError, "0"),
        ((1, -1), ValueError, "-1"),
        ((1, 2, 3), ValueError, "(1, 2, 3)"),
        (1.0, TypeError, "1.0"),
        ((2, 1.0), TypeError, "(2, 1.0)"),
        (True, TypeError, "True"),
        ("2", TypeError, "'2'"),
        (None, TypeError, "None"),
    ],
    "causal": [
        ("rows", ValueError, "'rows'"),
        ("", ValueError, "''"),
        (1, TypeError, "1"),
        (None, TypeError, "None"),
        ((True, False, False), TypeError, "(True, False, False)"),
        ((True,), TypeError, "(True,)"),
        ((True, 1), TypeError, "(True, 1)"),
        (("raster", "raster"), TypeError, "'raster'"),
    ],
    "bias": [
        ([[0.0]], TypeError, "list"),
        (0.0, TypeError, "float"),
        (np.zeros((2, 15)), TypeError, "ndarray"),
        (zeros(2, 15, dtype=torch.int64), TypeError, "torch.int64"),
        (zeros(2, 15, dtype=torch.bool), TypeError, "torch.bool"),
        (zeros(2, 15, dtype=torch.float64), TypeError, "torch.float64"),
        (zeros(2, 15, dtype=torch.float16), TypeError, "torch.float16"),
        (zeros(2, 15, device="meta"), TypeError, "meta"),
        (zeros(2, 15).to_sparse(), TypeError, "layout torch.sparse_coo"),
        (zeros(15), ValueError, "(15,)"),
        (zeros(1, 15), ValueError, "(1, 15)"),
        (zeros(2, 14), ValueError, "(2, 14)"),
        (zeros(2, 5, 3), ValueError, "[2, 15] or [2, 3, 5]"),
        (zeros(B, 2, 3, 5), ValueError, f"({B}, 2, 3, 5)"),
        (zeros(2, 5, 9), ValueError, "(2, 5, 9)"),  # by displacement, where nothing shifts
    ],
    "key_mask": [
        (True, TypeError, "bool"),
        (np.ones((B, H, W), bool), TypeError, "ndarray"),
        (zeros(B, H, W, dtype=torch.uint8), ValueError, "torch.uint8"),
        (zeros(B, H, W), ValueError, "torch.float32"),
        (zeros(B, H, W, dtype=torch.bool, device="meta"), TypeError, "meta"),
        (zeros(B, H, W, dtype=torch.bool).to_sparse(), TypeError, "layout torch.sparse_coo"),
        (zeros(B, W, H, dtype=torch.bool), ValueError, f"({B}, {W}, {H})"),
        (zeros(1, H, W, dtype=torch.bool), ValueError, f"(1, {H}, {W})"),
        (zeros(H, W, dtype=torch.bool), ValueError, f"({H}, {W})"),
        (zeros(B, 1, H, W, dtype=torch.bool), ValueError, f"({B}, 1, {H}, {W})"),
    ],
    "return_lse": [(1, TypeError, "1"), (None, TypeError, "None"), ("yes", TypeError, "'yes'")],
    "backend": [
        ("cuda", ValueError, "'cuda'"),
        ("", ValueError, "''"),
        (0, TypeError, "0"),
        (("triton",), TypeError, "('triton',)"),
    ],
}
KEYS = [*wrong_map(C), *unlike_map(C), (zeros(B, 4, H, W), ValueError, "must have 8 channels, 4 for each of 2 heads")]
MAPS = {
    "local_attention": {
        "query": wrong_map(C),
        "key": KEYS,
        "value": wrong_map(4)
        + unlike_map(4)
        + [
            (zeros(B, 4, H + 1, W), ValueError, f"got ({H + 1}, {W})"),
            (zeros(B, 4, H, 1), ValueError, f"got ({H}, 1)"),
        ],
    },
    "local_similarity": {"query": wrong_map(C), "key": KEYS},
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


# Rows of (arguments, the one to blame, error, words).
COMBINED = [
    ({"kv_heads": 1}, "key", ValueError, "must have 4 channels, 4 for each of 1 heads"),
    ({"key": zeros(B, C, 0, W), "value": zeros(B, 4, 0, W)}, "key", ValueError, "height 0"),
    ({"key": zeros(B, C, H, 0), "value": zeros(B, 4, H, 0)}, "key", ValueError, "width 0"),
    ({"border": "circular", "causal": True}, "causal", ValueError, "zeros, mask and shift, got border='circular'"),
    ({"border": ("zeros", "reflect"), "causal": (False, True)}, "causal", ValueError, "zeros, mask and shift"),
    ({"border": "replicate", "causal": (True, False)}, "causal", ValueError, "zeros, mask and shift"),
    ({"border": "shift", "causal": "raster"}, "causal", ValueError, "zeros and mask, got border='shift'"),
    ({"border": ("mask", "shift"), "causal": "raster"}, "causal", ValueError, "zeros and mask"),
    ({"border": ("circular", "zeros"), "causal": "raster"}, "causal", ValueError, "zeros and mask"),
    ({"border": "shift", "kernel_size": (6, 5)}, "kernel_size", ValueError, "the height of the keys, 5, under"),
    ({"border": "shift", "kernel_size": (5, 7)}, "kernel_size", ValueError, "the width of the keys, 6, under"),
    ({"border": "shift", "dilation": (2, 1)}, "kernel_size", ValueError, "got 3 * 2"),
    ({"border": ("zeros", "shift"), "dilation": (1, 2)}, "kernel_size", ValueError, "got 5 * 2"),
    ({"border": "shift", "kernel_size": 7, "causal": (True, False)}, "kernel_size", ValueError, "width"),
    ({"border": "reflect", "kernel_size": 10}, "kernel_size", ValueError, "at most 4 pixels past a map of height 5"),
    ({"border": "reflect", "kernel_size": (1, 13)}, "kernel_size", ValueError, "width 6 under border 'reflect', got 6"),
    ({"border": "reflect", "kernel_size": 3, "dilation": 5}, "kernel_size", ValueError, "got 5"),
    ({"border": "circular", "kernel_size": 12}, "kernel_size", ValueError, "at most 5 pixels past a map of height 5"),
    ({"border": ("mask", "circular"), "kernel_size": 15}, "kernel_size", ValueError, "width 6 under border 'circular'"),
    (
        {"border": "shift", "bias": zeros(2, 9, 5)},
        "bias",
        ValueError,
        "by displacement, [2, 5, 9], got shape (2, 9, 5)",
    ),
    ({"query": zeros(B, C, 0, W), "bias": zeros(2, 14)}, "bias", ValueError, "(2, 14)"),
]


@pytest.fixture
def no_work(monkeypatch):
    """Operators must not run."""
    for name in ("attention", "similarity", "aggregate"):
        for module in (ops, derivatives):
            monkeypatch.setattr(module, name, lambda *args, name=name: pytest.fail(f"{name} ran"))


def check_told(function, arguments, name, error, words):
    with pytest.raises(error) as caught:
        FUNCTIONS[function](**arguments)
    message = str(caught.value)
    assert caught.type is error
    assert name in message
    assert words in message
    assert "got" in message


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("function", "name", "value", "error", "words"), CASES)
def test_a_wrong_argument_is_told_by_name(function, name, value, error, words):
    check_told(function, good(function) | {name: value}, name, error, words)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("changes", "name", "error", "words"), COMBINED)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_combinations_are_told_by_name(function, changes, name, error, words):
    known = inspect.signature(FUNCTIONS[function]).parameters
    if name not in known and name != "key":
        pytest.skip(f"it takes no {name}")
    if name == "key" and function == "local_aggregate":
        if "kv_heads" in changes:
            pytest.skip("values may be of any depth")
        name = "value"
    arguments = good(function) | {k: x for k, x in changes.items() if k in known}
    if "weight" in arguments:
        kernel = arguments["kernel_size"]
        arguments["weight"] = zeros(B, 2, H, W, math.prod(kernel) if isinstance(kernel, tuple) else kernel**2)
    check_told(function, arguments, name, error, words)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_table_covers_every_argument(function):
    assert set(inspect.signature(FUNCTIONS[function]).parameters) <= set(COMMON | MAPS[function])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_the_table_starts_from_is_right(function):
    FUNCTIONS[function](**good(function), backend="reference")


RIGHT = {
    "kernel_size": [1, 3, (3, 5), [3, 5], torch.Size((3, 5)), (21, 1)],
    "heads": [1, 2, 4],
    "kv_heads": [None, 2],
    "scale": [None, 0, 0.0, -1, 2.5, np.float32(0.5), np.float64(0.5)],
    "border": [*BORDERS, ("mask", "mask"), ["zeros", "circular"]],
    "dilation": [1, 3, (1, 2), [1, 1]],
    "causal": [False, True, (False, True), [True, False], "raster"],
    "bias": [None, zeros(2, 15), zeros(2, 3, 5), zeros(2, 15)[:, :1].expand(2, 15)],
    "key_mask": [None, zeros(B, H, W, dtype=torch.bool)],
    "return_lse": [False, True],
    "backend": [None, "reference", "tiled"],
}
RIGHT_TOGETHER = [  # the last that each border serves, and what lifts its limits
    {"border": "shift", "kernel_size": (5, 6)},
    {"border": "shift", "kernel_size": (2, 3), "dilation": 2},
    {"border": "shift", "kernel_size": (9, 6), "causal": (True, False)},
    {"border": "shift", "kernel_size": 21, "causal": True},
    {"border": ("zeros", "shift"), "kernel_size": (21, 6)},
    {"border": "reflect", "kernel_size": (9, 11)},
    {"border": "reflect", "kernel_size": (5, 3), "dilation": (2, 5)},
    {"border": "circular", "kernel_size": (11, 13)},
    {"border": "circular", "kernel_size": 10},
    {"border": "replicate", "kernel_size": 21},
    {"border": ("circular", "mask"), "causal": (False, True)},
    {"border": ("mask", "shift"), "causal": (True, True)},
    {"border": ("zeros", "mask"), "causal": "raster"},
    {"border": "shift", "bias": zeros(2, 5, 9)},
    {"border": ("mask", "shift"), "bias": zeros(2, 5, 9)},
    {"border": "shift", "bias": zeros(2, 3, 5)},
    {"kernel_size": 1, "border": "shift", "bias": zeros(2, 1, 1)},
    {"kv_heads": 1, "key": zeros(B, 4, H, W), "value": zeros(B, 2, H, W)},
    {"key": zeros(B, C, 3, 9), "value": zeros(B, 4, 3, 9), "key_mask": zeros(B, 3, 9, dtype=torch.bool)},
    # aligned centres: the outer ones of two queries are one pixel inside of five keys
    {"query": zeros(B, C, 2, W), "border": "reflect", "kernel_size": (11, 5)},
    {"query": zeros(B, C, 0, W), "border": "shift", "kernel_size": 21},
    {"query": zeros(B, C, 0, W), "key": zeros(B, C, H, 0), "value": zeros(B, 4, H, 0)},
]


@pytest.mark.parametrize(
    "changes",
    [{name: value} for name, values in RIGHT.items() for value in values] + RIGHT_TOGETHER,
    ids=lambda changes: "-".join(changes),
)
def test_a_right_argument_is_taken(changes):
    arguments = {"backend": "reference"} | good("local_attention") | changes
    results = local_attention(**arguments)
    out = results[0] if changes.get("return_lse") else results
    assert out.shape == (B, 4, *arguments["query"].shape[2:])


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
    bias, plain = zeros(1, 9, dtype=torch.float16), {"backend": "reference"}
    with pytest.raises(TypeError, match=r"value.*torch.float32.*torch.bfloat16"):
        local_attention(query, key, value, 3, **plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert local_attention(query, key, value, 3, bias=bias, **plain).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"value.*torch.float64"):
            local_attention(query, key, value.double(), 3, **plain)
        with pytest.raises(TypeError, match=r"bias.*torch.float64"):
            local_attention(query, key, value, 3, bias=bias.double(), **plain)
