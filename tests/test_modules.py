"""The layer: what it computes, what it loads, and what its arguments do."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from calls import seeded
from image_local_attention import LocalAttention, local_attention


def former_state(layer: LocalAttention, prefix: str = "") -> dict:
    """The state dict of the original extension's layer."""
    names = {"query": "conv1", "key": "conv2", "value": "conv3"}
    return {f"{prefix}{names[name]}.weight": getattr(layer, name).weight.detach() for name in names}


@pytest.fixture
def x():
    return torch.randn(2, 3, 6, 5, generator=seeded(0))


@pytest.fixture
def context():
    return torch.randn(2, 3, 4, 7, generator=seeded(1))


FULL = {  # every argument, none at its default
    "heads": 4,
    "kv_heads": 2,
    "scale": None,
    "border": ("mask", "shift"),
    "dilation": (2, 1),
    "causal": (True, False),
    "position_bias": True,
    "backend": "reference",
}


def built(**options) -> LocalAttention:
    layer = LocalAttention(3, 8, 2, 3, **options)
    if layer.position_bias is not None:
        nn.init.normal_(layer.position_bias, generator=seeded(2))
    return layer


def test_it_attends_between_its_projections(x, context):
    layer = built(**FULL)
    mask = torch.rand(2, 4, 7, generator=seeded(3)) > 0.3

    def project(convolution, map):
        return torch.einsum("oc,bchw->bohw", convolution.weight[:, :, 0, 0], map)

    options = {name: value for name, value in FULL.items() if name != "position_bias"}
    wanted = local_attention(
        project(layer.query, x),
        project(layer.key, context),
        project(layer.value, context),
        (2, 3),
        bias=layer.position_bias,
        key_mask=mask,
        **options,
    )
    torch.testing.assert_close(layer(x, context, mask), wanted)
    torch.testing.assert_close(layer(x, context=context, key_mask=mask), wanted)
    assert not torch.allclose(layer(x, context), wanted)


def test_defaults_are_the_originals(x):
    layer = LocalAttention(3, 8, 3, 5)
    wanted = local_attention(layer.query(x), layer.key(x), layer.value(x), (3, 5), heads=1, scale=1.0, border="zeros")
    torch.testing.assert_close(layer(x), wanted)


def test_it_is_its_own_context(x):
    layer = built(heads=2, border="mask")
    torch.testing.assert_close(layer(x), layer(x, x), rtol=0, atol=0)
    mask = torch.rand(2, 6, 5, generator=seeded(3)) > 0.5
    torch.testing.assert_close(layer(x, key_mask=mask), layer(x, x, mask), rtol=0, atol=0)


def test_grouped_heads_share_keys_and_values(x):
    layer = built(heads=4, kv_heads=1, border="mask")
    assert [tuple(p.weight.shape) for p in (layer.query, layer.key, layer.value)] == [
        (8, 3, 1, 1),
        (2, 3, 1, 1),
        (2, 3, 1, 1),
    ]
    wide = built(heads=4, border="mask")
    with torch.no_grad():
        wide.query.weight.copy_(layer.query.weight)
        for ours, theirs in ((wide.key, layer.key), (wide.value, layer.value)):
            ours.weight.copy_(theirs.weight.repeat(4, 1, 1, 1))
    torch.testing.assert_close(layer(x), wide(x))
    assert layer.kv_heads == 1
    assert wide.kv_heads == 4


@pytest.mark.parametrize(
    ("border", "shape"),
    [
        ("zeros", (4, 2, 3)),
        ("replicate", (4, 2, 3)),
        (("zeros", "mask"), (4, 2, 3)),
        ("shift", (4, 3, 5)),
        (("mask", "shift"), (4, 3, 5)),
    ],
)
def test_a_position_bias_starts_from_zero_and_learns(x, border, shape):
    layer = LocalAttention(3, 8, 2, 3, heads=4, border=border, position_bias=True)
    without = LocalAttention(3, 8, 2, 3, heads=4, border=border)
    assert isinstance(layer.position_bias, nn.Parameter)
    assert tuple(layer.position_bias.shape) == shape
    assert not layer.position_bias.any()
    without.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "position_bias"})
    torch.testing.assert_close(layer(x), without(x))
    layer(x).square().sum().backward()
    assert (layer.position_bias.grad.abs().sum((1, 2)) > 0).all()
    if "shift" in border:  # a window that does not shift sees no farther than half of it
        far = layer.position_bias.grad[:, :, 4].abs().sum() > 0
        assert far


def test_without_a_position_bias_there_is_none():
    layer = LocalAttention(3, 8, 2, 3)
    assert layer.position_bias is None
    assert set(dict(layer.named_parameters())) == {"query.weight", "key.weight", "value.weight"}


def test_every_weight_and_the_input_have_gradients(x, target):
    layer = LocalAttention(3, 4, 3, 3, backend=target.backend).to(target.device)
    x = x.to(target.device).requires_grad_()
    layer(x).square().sum().backward()
    tensors = {"x": x, **dict(layer.named_parameters())}
    assert set(tensors) == {"x", "query.weight", "key.weight", "value.weight"}
    assert all(t.grad.abs().sum() > 0 for t in tensors.values())


def test_both_inputs_and_every_weight_have_gradients(x, context):
    layer = built(**FULL)
    tensors = {"x": x.requires_grad_(), "context": context.requires_grad_(), **dict(layer.named_parameters())}
    layer(x, context).square().sum().backward()
    assert set(tensors) == {"x", "context", "query.weight", "key.weight", "value.weight", "position_bias"}
    assert all(t.grad.abs().sum() > 0 for t in tensors.values())


def test_a_causal_layer_does_not_see_what_comes_later(x):
    layer = built(heads=2, border="mask", causal="raster")
    later = x.clone()
    later[:, :, 3, 2:] += 1
    later[:, :, 4:] += 1
    same = layer(x) == layer(later)
    assert same[:, :, :3].all()
    assert same[:, :, 3, :2].all()
    assert not same[:, :, 3, 2].any()


def test_no_key_is_nowhere(x):
    layer = built(heads=2, border="mask")
    assert not layer(x, key_mask=torch.zeros(2, 6, 5, dtype=torch.bool)).any()


@pytest.mark.parametrize("options", [{}, FULL], ids=["defaults", "full"])
def test_channels_last_goes_through(x, options):
    model = nn.Sequential(built(**options), nn.Conv2d(8, 3, 1), built(**options)).to(memory_format=torch.channels_last)
    for layer in (model[0], model):
        out = layer(x.contiguous(memory_format=torch.channels_last))
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert not out.is_contiguous()
        torch.testing.assert_close(out, layer(x))
    assert built(**options)(x).is_contiguous()


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


def test_the_originals_state_dict_loads_beside_a_position_bias():
    layer = built(position_bias=True)
    state = former_state(built())
    assert layer.load_state_dict(state, strict=False) == (["position_bias"], [])
    with pytest.raises(RuntimeError, match="position_bias"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("options", [{}, FULL], ids=["defaults", "full"])
def test_its_own_state_dict_makes_the_round_trip(x, options):
    ours, theirs = built(**options), built(**options)
    names = ["query.weight", "key.weight", "value.weight"]
    assert sorted(theirs.state_dict()) == sorted(names + ["position_bias"] * bool(options))
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert ours.load_state_dict(torch.load(file), strict=True) == ([], [])
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_compute_the_same_and_share_nothing(x, context, duplicate):
    layer = built(**FULL)
    layer(x).sum().backward()
    other = duplicate(layer)
    torch.testing.assert_close(other(x, context), layer(x, context), rtol=0, atol=0)
    assert repr(other) == repr(layer)
    assert other.load_state_dict(former_state(built(**FULL)), strict=False) == (["position_bias"], [])
    assert not torch.allclose(other(x, context), layer(x, context))


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
    assert LocalAttention(3, 8, 3, 5).extra_repr() == (
        "kernel_size=(3, 5), heads=1, kv_heads=1, scale=1.0, border='zeros', dilation=1, causal=False, "
        "position_bias=False"
    )
    text = repr(built(**FULL))
    said = (
        "heads=4",
        "kv_heads=2",
        "scale=None",
        "border=('mask', 'shift')",
        "dilation=(2, 1)",
        "causal=(True, False)",
    )
    assert all(part in text for part in said)


def test_a_map_of_the_wrong_kind_is_told(x):
    layer = built(heads=2)
    with pytest.raises(ValueError, match=r"key must have the batch size of query, 2, got 1"):
        layer(x, x[:1])
    with pytest.raises(ValueError, match=r"key_mask must be \[B, Hk, Wk\]"):
        layer(x, key_mask=torch.ones(2, 5, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="the width of the keys"):
        built(border="shift")(x, x[..., :2])
