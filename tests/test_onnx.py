"""ONNX: layers and operators exported in standard operators, run by onnxruntime."""

import warnings

import pytest
import torch

from image_local_attention import LocalAttention, local_aggregate, local_attention, local_similarity

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

BIAS = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(1))


class Call(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *maps):
        return self.function(*maps)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def run_elsewhere(module, inputs, path):
    """The exported module's results, and the domains of its operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own parts
        program = torch.onnx.export(module, inputs, dynamo=True, verbose=False)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {each.name: x.numpy() for each, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(x) for x in session.run(None, feed)], {node.domain for node in program.model.graph}


def biased_layer():
    layer = LocalAttention(3, 8, 5, 3, heads=2, position_bias=True, border="reflect")
    torch.nn.init.normal_(layer.position_bias)
    return layer


MAPS = normal(1, 4, 7, 6), normal(1, 2, 5, 4), normal(1, 4, 5, 4)
CASES = {
    "attention": (
        lambda q, k, v: local_attention(q, k, v, 3, heads=2, kv_heads=1, border="shift", bias=BIAS, return_lse=True),
        MAPS,
    ),
    "similarity": (lambda q, k: local_similarity(q, k, 3, heads=2, kv_heads=1, border="circular"), MAPS[:2]),
    "aggregate": (lambda w, v: local_aggregate(w, v, (3, 2), heads=2, dilation=2), (normal(1, 2, 5, 4, 6), MAPS[2])),
    "layer": (biased_layer(), (normal(1, 3, 8, 9),)),
}


@pytest.mark.parametrize("name", CASES)
def test_an_exported_graph_gives_the_same_in_onnxruntime(name, tmp_path):
    function, inputs = CASES[name]
    module = function if isinstance(function, torch.nn.Module) else Call(function)
    wanted = module(*inputs)
    results, domains = run_elsewhere(module, inputs, tmp_path / "model.onnx")
    assert domains == {""}  # the standard's own
    for got, want in zip(results, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=0, atol=1e-5)
