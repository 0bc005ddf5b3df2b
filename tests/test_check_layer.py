"""Wrong arguments of the layer, when it is built, and of `merge`: told by name, before any work."""

import inspect

import pytest
import torch

from image_local_attention import LocalAttention, merge

LAYER = {
    "inp_channels": [(0, ValueError, "0"), (3.0, TypeError, "3.0"), (True, TypeError, "True")],
    "out_channels": [(-8, ValueError, "-8"), ("8", TypeError, "'8'"), (7, ValueError, "multiple of heads=2, got 7")],
    "kH": [(0, ValueError, "(0, 3)"), (3.5, TypeError, "(3.5, 3)"), ((3, 3), TypeError, "(3, 3)")],
    "kW": [(-1, ValueError, "(3, -1)"), (None, TypeError, "None"), (True, TypeError, "True")],
    "heads": [(0, ValueError, "0"), (3, ValueError, "3"), (1.0, TypeError, "1.0")],
    "kv_heads": [(0, ValueError, "0"), (3, ValueError, "kv_heads=3"), (1.0, TypeError, "1.0"), (False, TypeError, "F")],
    "scale": [("1", TypeError, "'1'"), (float("nan"), ValueError, "nan"), (True, TypeError, "True")],
    "border": [("edge", ValueError, "'edge'"), (3, TypeError, "3"), (("mask",) * 3, TypeError, "pair")],
    "dilation": [(0, ValueError, "0"), (1.5, TypeError, "1.5"), ((1, 2, 3), ValueError, "(1, 2, 3)")],
    "causal": [(1, TypeError, "1"), ("rows", ValueError, "'rows'"), ((True,), TypeError, "(True,)")],
    "position_bias": [(1, TypeError, "1"), (None, TypeError, "None"), (torch.zeros(2, 9), TypeError, "tensor")],
    "backend": [("cuda", ValueError, "'cuda'"), (1, TypeError, "1")],
}
SETTINGS = {"inp_channels": 3, "out_channels": 8, "kH": 3, "kW": 3, "heads": 2}


@pytest.mark.parametrize(
    ("name", "value", "error", "words"), [(name, *row) for name, rows in LAYER.items() for row in rows]
)
def test_wrong_arguments_are_refused_when_it_is_built(name, value, error, words):
    with pytest.raises(error) as caught:
        LocalAttention(**SETTINGS | {name: value})
    assert caught.type is error
    assert ("kernel_size" if name in ("kH", "kW") else name) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("border", "causal"), [("circular", True), (("zeros", "reflect"), (False, True)), ("shift", "raster")]
)
def test_a_border_that_causality_does_not_go_with_is_refused_when_it_is_built(border, causal):
    with pytest.raises(ValueError, match=r"causal=.* goes with the borders zeros.* got border="):
        LocalAttention(**SETTINGS, border=border, causal=causal)


def test_the_table_covers_every_argument_of_the_layer():
    assert set(inspect.signature(LocalAttention).parameters) == set(LAYER)


OUT, LSE = torch.zeros(1, 4, 3, 5), torch.zeros(1, 2, 3, 5)
RESULTS = [
    (None, TypeError, "results must be a sequence of pairs"),
    (OUT, TypeError, "results must be a sequence of pairs"),
    ([], (TypeError, ValueError), "results must be a sequence of pairs (out, lse), got []"),
    ((OUT, LSE), TypeError, "results[0] must be a pair (out, lse), got Tensor"),
    ([OUT], TypeError, "results[0] must be a pair"),
    ([(OUT, LSE), (OUT,)], TypeError, "results[1] must be a pair"),
    ([(OUT, LSE, OUT)], TypeError, "results[0] must be a pair"),
    ([(OUT, None)], TypeError, "results[0][1]"),
    ([(OUT, LSE), (0.0, LSE)], TypeError, "results[1][0]"),
    ([(OUT.long(), LSE)], TypeError, "torch.int64"),
    ([(OUT, LSE[0])], ValueError, "results[0][1]"),
    ([(OUT, LSE), (OUT.double(), LSE)], TypeError, "results[1][0] must have the dtype of results[0][0], torch.float32"),
    ([(OUT, LSE), (OUT, LSE.double())], TypeError, "results[1][1] must have the dtype of results[0][1]"),
    ([(OUT, LSE), (OUT.to("meta"), LSE)], TypeError, "results[1][0] must be on the device of results[0][0], cpu"),
    ([(OUT, LSE), (OUT[:, :2], LSE)], ValueError, "(1, 4, 3, 5), got (1, 2, 3, 5)"),
    ([(OUT, LSE), (OUT, LSE[..., :1])], ValueError, "results[1][1] must have the shape of results[0][1]"),
    ([(OUT, LSE[:, :, :1])], ValueError, "got (1, 4, 3, 5) and (1, 2, 1, 5)"),
    ([(OUT[:, :3], LSE)], ValueError, "got (1, 3, 3, 5) and (1, 2, 3, 5)"),
    ([(OUT, LSE.expand(2, -1, -1, -1))], ValueError, "got (1, 4, 3, 5) and (2, 2, 3, 5)"),
    ([(OUT, LSE[:, :0])], ValueError, "got (1, 4, 3, 5) and (1, 0, 3, 5)"),
    ([(OUT, LSE.to("meta"))], TypeError, "results[0][1] must be on the device of results[0][0], cpu, got meta"),
]


@pytest.mark.parametrize(("results", "error", "words"), RESULTS)
def test_what_cannot_be_merged_is_told(results, error, words):
    with pytest.raises(error) as caught:
        merge(results)
    assert words in str(caught.value)
    assert "got" in str(caught.value)


@pytest.mark.parametrize("kind", [list, tuple])
def test_what_can_be_merged_is(kind):
    out, lse = merge(kind(kind(pair) for pair in [(OUT + 1, LSE), (OUT + 3, LSE)]))
    torch.testing.assert_close(out, OUT + 2)
    torch.testing.assert_close(lse, LSE + torch.tensor(2.0).log())
