"""torch.compile and torch.export: one graph with the eager results, whatever the options, for every image size."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from calls import KERNEL, OPERATORS, OPTIONS, PLAIN, REFERENCE, Options, seeded
from image_local_attention import LocalAttention, local_attention, merge, ops

operators = pytest.mark.parametrize("operator", OPERATORS)
samples = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
# What hangs on the version of torch, not on the backend, is tried wherever tests run.
anywhere = pytest.mark.parametrize("target", REFERENCE)


def compiler(target) -> str:
    return "inductor" if target == ("triton", "cuda") else "aot_eager"


def check_compiled(function, inputs, compiler: str) -> None:
    """One graph gives the results and gradients of the eager function, in its memory format."""
    torch._dynamo.reset()
    check_same(torch.compile(function, fullgraph=True, backend=compiler), function, inputs)


def check_same(compiled, function, inputs) -> None:
    wanted, got = function(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, wanted)
    assert got.stride() == wanted.stride()
    used = [x for x in inputs if x.requires_grad]
    grad = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad(got, used, grad, allow_unused=True),
        torch.autograd.grad(wanted, used, grad, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@operators
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_forward_and_backward(target, operator, layout):
    if target.interpreted and layout == "contiguous":
        pytest.skip("the interpreter is slow")
    size = (2, 3) if target.interpreted else (6, 7)
    options = Options(queries=size, keys=size)

    def function(*maps):
        return options.call(operator, *maps, backend=target.backend)

    check_compiled(function, options.maps(target.device, layout), compiler(target))


@samples
@operators
@anywhere
def test_compiled_with_options(target, operator, options):
    def function(*inputs):
        return options.call(operator, *inputs, backend=target.backend)

    check_compiled(function, options.inputs(target.device), compiler(target))


def test_compiled_log_sum_exp(target):
    def function(*maps):
        out, lse = local_attention(*maps, KERNEL, scale=None, return_lse=True, border="mask", backend=target.backend)
        return out + lse  # no sum over pixels: the order of its terms is the compiler's

    size = (2, 3) if target.interpreted else (6, 7)
    check_compiled(function, Options(queries=size, keys=size).maps(target.device), compiler(target))


@anywhere
def test_compiled_merge(target):
    def function(query, key, value):
        near = local_attention(query, key, value, 3, heads=2, return_lse=True, border="mask", backend=target.backend)
        far = local_attention(
            query, key, value, 3, heads=2, return_lse=True, border="mask", dilation=2, backend=target.backend
        )
        out, lse = merge([near, far])
        return out * lse.sum()

    check_compiled(function, PLAIN.maps(target.device), compiler(target))


def test_compiled_layer_with_options_by_inductor():
    layer = LocalAttention(3, 8, 3, 3, heads=2, kv_heads=1, border="shift", position_bias=True, backend="reference")
    torch.nn.init.normal_(layer.position_bias, generator=seeded(0))
    context = torch.randn(2, 3, 4, 7, requires_grad=True)
    check_compiled(layer, [torch.randn(2, 3, 6, 5, requires_grad=True), context], "inductor")


@operators
def test_autocast_under_compile(operator):
    torch._dynamo.reset()
    options = OPTIONS["globe"]
    x = options.inputs("cpu")
    compiled = torch.compile(
        lambda *x: options.call(operator, *x, backend="reference"), fullgraph=True, backend="aot_eager"
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = compiled(*x), options.call(operator, *x, backend="reference")
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, wanted)


def test_a_compiled_graph_follows_a_change_of_precision():
    torch._dynamo.reset()
    seen = []

    def spy(graph, inputs):
        seen.extend(a for node in graph.graph.nodes for a in node.args if a in ("ieee", "tf32"))
        return graph.forward

    compiled = torch.compile(lambda *x: local_attention(*x, 3, backend="reference"), fullgraph=True, backend=spy)
    x = [m.detach() for m in PLAIN.maps("cpu")]
    for precision in ("highest", "high", "highest"):
        torch.set_float32_matmul_precision(precision)
        compiled(*x)
    assert seen[:2] == ["ieee", "tf32"]


@anywhere
def test_options_may_be_arguments_of_the_graph(target):
    torch._dynamo.reset()
    compiled = torch.compile(local_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    x = PLAIN.maps(target.device)
    for options in (
        {"scale": 0.3},
        {"scale": -1.5, "heads": 2},
        {"scale": None, "border": "mask"},
        {"border": "shift", "dilation": 2},
        {"border": "mask", "causal": "raster"},
    ):
        options |= {"backend": target.backend}
        torch.testing.assert_close(compiled(*x, (3, 2), **options), local_attention(*x, (3, 2), **options))


DYNAMIC = {  # with biases whose sizes are no map's: torch takes numbers that are equal at first for one number
    "plain": ((3, 3), Options()),
    "mask": ((3, 3), Options("mask")),
    "shift": ((3, 4), Options("shift", bias=(5, 7))),
    "reflect": ((3, 3), Options(("reflect", "circular"), dilation=(1, 2))),
    "causal": ((4, 3), Options(("mask", "shift"), causal=(True, False), bias=(12,))),
}


@anywhere
@pytest.mark.parametrize("marked", [False, True], ids=["dynamic", "marked"])
@pytest.mark.parametrize(("kernel", "options"), DYNAMIC.values(), ids=DYNAMIC)
def test_one_graph_takes_every_size(target, kernel, options, marked):
    torch._dynamo.reset()
    bias = options.position_bias(target.device)

    def attend(*maps):
        return local_attention(
            *maps, kernel, heads=2, scale=None, bias=bias, backend=target.backend, **options.geometry()
        )

    sizes = ((9, 8), (8, 11), (13, 10))
    check_one_graph(attend, [options._replace(queries=s, keys=s).maps(target.device) for s in sizes], marked)


def check_one_graph(function, inputs, marked: bool = False) -> None:
    """What is compiled for the first inputs serves all. (Their first graph may be made twice, for its floats.)"""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=None if marked else True, backend=counter)
    counts = []
    for maps in inputs:
        for x in maps if marked else ():
            torch._dynamo.mark_dynamic(x, (2, 3))
        check_same(compiled, function, maps)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * len(inputs)


@anywhere
@pytest.mark.parametrize("border", ["replicate", "shift"])
def test_one_graph_takes_grids_of_every_two_sizes(target, border):
    torch._dynamo.reset()

    def attend(*maps):
        return local_attention(*maps, 3, heads=2, kv_heads=1, border=border, backend=target.backend)

    sizes = ((9, 8), (7, 10)), ((6, 11), (13, 5)), ((4, 12), (8, 6))
    check_one_graph(attend, [Options(kv_heads=1, queries=q, keys=k).maps(target.device) for q, k in sizes])


class Operator(torch.nn.Module):
    def __init__(self, operator: str, options: Options, backend: str) -> None:
        super().__init__()
        self.operator, self.options, self.backend = operator, options, backend

    def forward(self, *inputs):
        return self.options.call(self.operator, *inputs, backend=self.backend)


@anywhere
@samples
@operators
def test_export(target, operator, options):
    model = Operator(operator, options, target.backend)
    inputs = tuple(x.detach() for x in options.inputs(target.device))
    program = torch.export.export(model, inputs)
    assert any(ops.NAMESPACE in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), model(*inputs))


@anywhere
@operators
@pytest.mark.parametrize("name", ["plain", "shift", "reflect"])
def test_export_for_every_size(target, operator, name):
    options = {"plain": Options(), "shift": Options("shift", bias=(5, 7)), "reflect": Options("reflect")}[name]
    model = Operator(operator, options, target.backend)

    def inputs(size):
        return tuple(x.detach() for x in options._replace(queries=size, keys=size).inputs(target.device))

    smallest = 4 if name == "shift" else 3  # windows of three rows and four columns
    height, width = torch.export.Dim("height", min=smallest, max=999), torch.export.Dim("width", min=4, max=999)
    shapes = [{2: height, 3: width}] * 3 + [None] * (options.bias is not None)
    program = torch.export.export(model, inputs((6, 9)), dynamic_shapes=(tuple(shapes),))
    for size in ((6, 9), (9, 6), (4, 4), (30, 5)):
        torch.testing.assert_close(program.module()(*inputs(size)), model(*inputs(size)))


@anywhere
@operators
def test_a_compiled_forward_mode_is_refused(target, operator):
    torch._dynamo.reset()
    q, k, v = (m.detach() for m in PLAIN.maps(target.device))

    def attend(x):
        return PLAIN.call(operator, x, x + k, x + v, backend=target.backend)

    def f(x, tangent):
        return torch.func.jvp(attend, (x,), (tangent,))[1]

    with pytest.raises(Exception, match=r"(?i)forward|jvp"):  # dynamo wraps it
        torch.compile(f, fullgraph=True, backend="aot_eager")(q, k)
