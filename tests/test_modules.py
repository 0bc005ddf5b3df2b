"""The layer: what it computes, what it loads, and what it refuses."""

import io

import pytest
import torch
from torch import nn

from image_local_attention import LocalAttention, local_attention


def former_state(layer: LocalAttention, prefix: str = "") -> dict:
    """The state dict of the original extension's layer."""
    names = {"query": "conv1", "key": "conv2", "value": "conv3"}
    return {f"{prefix}{names[name]}.weight": getattr(layer, name).weight.detach() for name in names}


@pytest.fixture
def x():
    return torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))


def test_it_attends_between_its_projections(x):
    layer = LocalAttention(3, 8, 3, 5, heads=2, scale=None, border="mask", backend="reference")
    projections = (
        torch.einsum("oc,bchw->bohw", p.weight[:, :, 0, 0], x) for p in (layer.query, layer.key, layer.value)
    )
    wanted = local_attention(*projections, (3, 5), heads=2, scale=None, border="mask", backend="reference")
    torch.testing.assert_close(layer(x), wanted)


def test_defaults_are_the_originals(x):
    layer = LocalAttention(3, 8, 3, 5)
    wanted = local_attention(layer.query(x), layer.key(x), layer.value(x), (3, 5), heads=1, scale=1.0, border="zeros")
    torch.testing.assert_close(layer(x), wanted)


def test_every_weight_and_the_input_have_gradients(x, target):
    layer = LocalAttention(3, 4, 3, 3, backend=target.backend).to(target.device)
    x = x.to(target.device).requires_grad_()
    layer(x).square().sum().backward()
    tensors = {"x": x, **dict(layer.named_parameters())}
    assert set(tensors) == {"x", "query.weight", "key.weight", "value.weight"}
    assert all(t.grad.abs().sum() > 0 for t in tensors.values())


def test_channels_last_goes_through(x):
    layer = LocalAttention(3, 8, 3, 3).to(memory_format=torch.channels_last)
    out = layer(x.contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_the_originals_state_dict_loads(x):
    ours, theirs = LocalAttention(3, 8, 3, 3), LocalAttention(3, 8, 3, 3)
    assert ours.load_state_dict(former_state(theirs), strict=True) == ([], [])
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_the_originals_state_dict_loads_inside_a_bigger_model(x):
    def model():
        return nn.Sequential(nn.Conv2d(3, 3, 1), nn.ModuleDict({"attend": LocalAttention(3, 8, 3, 3)})["attend"])

    ours, theirs = model(), model()
    state = {k: v for k, v in theirs.state_dict().items() if k.startswith("0.")} | former_state(theirs[1], "1.")
    assert ours.load_state_dict(state, strict=True) == ([], [])
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_its_own_state_dict_makes_the_round_trip(x):
    ours, theirs = LocalAttention(3, 8, 3, 3), LocalAttention(3, 8, 3, 3)
    assert list(theirs.state_dict()) == ["query.weight", "key.weight", "value.weight"]
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    assert ours.load_state_dict(torch.load(file), strict=True) == ([], [])
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_loading_changes_nothing_of_the_callers_state_dict():
    layer = LocalAttention(3, 8, 3, 3)
    state = former_state(layer)
    layer.load_state_dict(state)
    assert list(state) == ["conv1.weight", "conv2.weight", "conv3.weight"]


def test_missing_and_strange_weights_are_told():
    layer = LocalAttention(3, 8, 3, 3)
    state = former_state(layer)
    del state["conv2.weight"]
    with pytest.raises(RuntimeError, match=r"key\.weight"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"conv4\.weight"):
        layer.load_state_dict(former_state(layer) | {"conv4.weight": torch.zeros(1)})


def test_it_says_what_it_is():
    text = repr(LocalAttention(3, 8, 3, 5, heads=2, border="mask"))
    assert all(part in text for part in ("kernel_size=(3, 5)", "heads=2", "scale=1.0", "border='mask'", "dilation=1"))


ARGUMENTS = {
    "inp_channels": [(0, ValueError), (3.0, TypeError), (True, TypeError)],
    "out_channels": [(-8, ValueError), ("8", TypeError), (7, ValueError)],  # 7 is no multiple of two heads
    "kH": [(0, ValueError), (3.5, TypeError)],
    "kW": [(-1, ValueError), (None, TypeError)],
    "heads": [(0, ValueError), (3, ValueError), (1.0, TypeError)],
    "scale": [("1", TypeError), (float("nan"), ValueError), (True, TypeError)],
    "border": [("edge", ValueError), (3, TypeError), ("shift", NotImplementedError)],
    "dilation": [(0, ValueError), (1.5, TypeError), (2, NotImplementedError)],
    "backend": [("cuda", ValueError), (1, TypeError)],
}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [(name, *case) for name, cases in ARGUMENTS.items() for case in cases],
)
def test_wrong_arguments_are_refused_when_it_is_built(name, value, error):
    arguments = {"inp_channels": 3, "out_channels": 8, "kH": 3, "kW": 3, "heads": 2, name: value}
    named = "kernel_size" if name in ("kH", "kW") else name
    with pytest.raises(error, match=named):
        LocalAttention(**arguments)
