"""Citizenship of the registered operators: opcheck, compilation, export, autocast, and what they refuse."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import CUDA, TARGETS
from image_local_attention import LocalAttention, local_aggregate, local_attention, local_similarity, ops
from problems import lay_out

HEADS, KERNEL = 2, (3, 4)
OPERATORS = ("attention", "similarity", "aggregate")
operators = pytest.mark.parametrize("operator", OPERATORS)
forward_mode = torch.autograd.forward_ad
# What hangs on the version of torch, not on the backend, is tried wherever tests run.
anywhere = pytest.mark.parametrize("target", [t.param() for t in TARGETS if t.backend == "reference"])


def maps(device: str, *, layout="contiguous", dtype=torch.float32, size=(2, 4, 5, 6)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        lay_out(torch.randn(size, generator=generator).to(device, dtype), layout).requires_grad_() for _ in range(3)
    ]


def call(operator: str, q, k, v, backend=None, **options):
    """One of the public functions over maps alone."""
    options |= {"heads": HEADS, "backend": backend}
    if operator == "attention":
        return local_attention(q, k, v, KERNEL, **options)
    if operator == "similarity":
        return local_similarity(q, k, KERNEL, **options)
    return local_aggregate(
        q.flatten(1).new_ones(len(q), HEADS, *q.shape[2:], 12) * q[:, :HEADS, ..., None], v, KERNEL, **options
    )


def arguments(device: str, backend: str, layout: str, border: str) -> dict[str, tuple]:
    """Arguments of every registered operator, by name."""
    q, k, v = maps(device, layout=layout)
    where = list(KERNEL), border, "ieee", backend
    weight = torch.randn(2, HEADS, 5, 6, 12, device=device).requires_grad_()
    out, lse = (x.detach() for x in ops.attention(q, k, v, HEADS, 0.7, *where))
    fixed = [x.detach() for x in (q, k, v)]
    wanted = [True, False, True]
    return {
        "attention": (q, k, v, HEADS, 0.7, *where),
        "attention_backward": (
            torch.ones_like(out),
            torch.ones_like(lse),
            *fixed,
            out,
            lse,
            wanted,
            HEADS,
            0.7,
            *where,
        ),
        "similarity": (q, k, HEADS, 0.7, float("-inf") if border == "mask" else 0.0, *where),
        "aggregate": (weight, v, 0.5, *where),
        "aggregate_transpose": (weight, v, 0.5, *where),
    }


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("name", ["attention", "attention_backward", "similarity", "aggregate", "aggregate_transpose"])
def test_opcheck(target, name, layout):
    border = "zeros" if name == "similarity" else "mask"  # opcheck's comparison knows no infinity minus infinity
    torch.library.opcheck(getattr(ops, name), arguments(target.device, target.backend, layout, border)[name])


@operators
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_forward_and_backward(target, operator, layout):
    def function(*maps):
        return call(operator, *maps, backend=target.backend, border="zeros")

    check_compiled(function, maps(target.device, layout=layout), compiler(target))


def test_compiled_log_sum_exp(target):
    def function(*maps):
        out, lse = local_attention(*maps, KERNEL, scale=None, return_lse=True, border="mask", backend=target.backend)
        return out * lse.sum()

    check_compiled(function, maps(target.device), compiler(target))


def test_compiled_layer_by_inductor():
    layer = LocalAttention(3, 8, 3, 3, heads=2)
    check_compiled(layer, [torch.randn(2, 3, 6, 5, requires_grad=True)], "inductor")


def compiler(target) -> str:
    return "inductor" if target == ("triton", "cuda") else "aot_eager"


def check_compiled(function, inputs, compiler: str) -> None:
    """One graph gives the results and gradients of the eager function, in its memory format."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
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


@anywhere
def test_one_graph_takes_every_size(target):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def attend(*maps):
        return local_attention(*maps, 3, scale=None, backend=target.backend)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=backend)
    for size in ((2, 4, 5, 6), (3, 4, 8, 7), (5, 4, 11, 9)):
        x = maps(target.device, size=size)
        torch.testing.assert_close(compiled(*x), attend(*x))
    assert len(graphs) == 1


@anywhere
def test_options_may_be_arguments_of_the_graph(target):
    torch._dynamo.reset()
    compiled = torch.compile(local_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    x = maps(target.device)
    for options in ({"scale": 0.3}, {"scale": -1.5, "heads": 2}, {"scale": None, "border": "mask"}):
        options |= {"backend": target.backend}
        torch.testing.assert_close(compiled(*x, (3, 4), **options), local_attention(*x, (3, 4), **options))


@anywhere
@operators
def test_export(target, operator):
    class Model(torch.nn.Module):
        def forward(self, *maps):
            return call(operator, *maps, backend=target.backend)

    inputs = tuple(x.detach() for x in maps(target.device))
    program = torch.export.export(Model(), inputs)
    assert any(ops.NAMESPACE in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), Model()(*inputs))


class Arguments(TorchDispatchMode):
    """The arguments of our operators as they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == ops.NAMESPACE:
            self.calls.append((func.name().removeprefix(f"{ops.NAMESPACE}::"), args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("asked", "wanted"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_products_follow_torchs_matmul_precision(asked, wanted):
    torch.set_float32_matmul_precision(asked)
    x = maps("cpu")
    with Arguments() as seen:
        out = sum(call(operator, *x).sum() for operator in OPERATORS)
        torch.set_float32_matmul_precision("highest")  # the backward keeps the forward's
        torch.autograd.grad(out, x)
    names = [name for name, _ in seen.calls]
    assert {"attention", "attention_backward", "similarity", "aggregate", "aggregate_transpose"} <= set(names)
    assert {args[-2] for _, args in seen.calls} == {wanted}


def test_a_compiled_graph_follows_a_change_of_precision():
    torch._dynamo.reset()
    seen = []

    def spy(graph, inputs):
        seen.extend(a for node in graph.graph.nodes for a in node.args if a in ("ieee", "tf32"))
        return graph.forward

    compiled = torch.compile(lambda *x: local_attention(*x, 3), fullgraph=True, backend=spy)
    x = [m.detach() for m in maps("cpu")]
    for precision in ("highest", "high", "highest"):
        torch.set_float32_matmul_precision(precision)
        compiled(*x)
    assert seen[:2] == ["ieee", "tf32"]


@operators
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_takes_the_users_dtype(target, operator, half):
    if target.interpreted and half == torch.bfloat16:
        pytest.skip("the interpreter's bf16 products are not those of a GPU")
    x = maps(target.device)
    with torch.autocast(target.device, dtype=half):
        got = call(operator, *x, backend=target.backend)
        again = call(operator, x[0].to(half), x[1], x[2].to(half), backend=target.backend)
    wanted = call(operator, *(m.detach().to(half) for m in x), backend=target.backend)
    assert got.dtype == again.dtype == half
    assert torch.equal(got, wanted)
    assert torch.equal(again, wanted)
    used = x if operator == "attention" else x[:2] if operator == "similarity" else x[::2]
    for grad in torch.autograd.grad(got.float().square().sum(), used):
        assert grad.dtype == torch.float32
        assert grad.abs().sum() > 0


def test_autocast_leaves_fp64_alone():
    x = maps("cpu", dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {call(operator, *x).dtype for operator in OPERATORS} == {torch.float64}


@operators
def test_autocast_under_compile(operator):
    torch._dynamo.reset()
    x = maps("cpu")
    compiled = torch.compile(lambda *x: call(operator, *x), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = compiled(*x), call(operator, *x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@operators
def test_without_gradients(target, operator, mode):
    x = [m.detach() for m in maps(target.device)]
    wanted = call(operator, *x, backend=target.backend)
    with mode():
        got = call(operator, *x, backend=target.backend)
    assert not got.requires_grad
    assert torch.equal(got, wanted)


@operators
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_fake_tensors_know_shape_dtype_and_format(operator, layout, dtype):
    options = {"return_lse": True} if operator == "attention" else {}
    x = [m.detach() for m in maps("cpu", layout=layout, dtype=dtype)]
    real = call(operator, *x, **options)
    with FakeTensorMode() as mode:
        fake = call(operator, *(mode.from_tensor(m) for m in x), **options)
    for x, y in zip(fake, real, strict=True) if options else [(fake, real)]:
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


def test_a_second_derivative_of_the_fused_operator_is_refused(target):
    q, k, v = maps(target.device)
    out = call("attention", q, k, v, backend=target.backend)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    for grad in grads:
        with pytest.raises(NotImplementedError, match="second derivative"):
            torch.autograd.grad(grad.sum(), (q, k, v), allow_unused=True, retain_graph=True)


def test_a_second_derivative_by_way_of_the_upstream_gradient_is_refused():
    q, k, v = (m.detach() for m in maps("cpu"))
    q.requires_grad_()
    upstream = torch.ones_like(v).requires_grad_()
    (grad,) = torch.autograd.grad(call("attention", q, k, v), q, upstream, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(grad.sum(), upstream)


def dual(f, q, tangent):
    with forward_mode.dual_level():
        return f(forward_mode.make_dual(q, tangent))


def forward_over_reverse(f, q, tangent):
    def loss(q):
        return f(q).sum()

    options = {"outer_jacobian_strategy": "forward-mode", "vectorize": True}
    return torch.autograd.functional.hessian(loss, q, **options)


FORWARD = {
    "dual": dual,
    "jvp": lambda f, q, tangent: torch.func.jvp(f, (q,), (tangent,)),
    "jacfwd": lambda f, q, tangent: torch.func.jacfwd(f)(q),
    "linearize": lambda f, q, tangent: torch.func.linearize(f, q),
    "hessian": forward_over_reverse,
}


@pytest.mark.parametrize("transform", FORWARD.values(), ids=FORWARD)
@operators
@anywhere
def test_forward_mode_is_refused(target, operator, transform):
    q, k, v = (m.detach() for m in maps(target.device, size=(1, 2, 2, 2)))
    with pytest.raises(NotImplementedError, match=r"(?i)forward-mode|second derivative"):
        transform(lambda x: call(operator, x, x + k, x + v, backend=target.backend), q, k)


@anywhere
@operators
def test_a_compiled_forward_mode_is_refused(target, operator):
    torch._dynamo.reset()
    q, k, v = (m.detach() for m in maps(target.device, size=(1, 2, 3, 3)))

    def attend(x):
        return call(operator, x, x + k, x + v, backend=target.backend)

    def f(x, tangent):
        return torch.func.jvp(attend, (x,), (tangent,))[1]

    with pytest.raises(Exception, match=r"(?i)forward|jvp"):  # dynamo wraps it
        torch.compile(f, fullgraph=True, backend="aot_eager")(q, k)


@operators
def test_function_transforms_are_refused_not_wrong(operator):
    q, k, v = (m.detach() for m in maps("cpu"))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda q: call(operator, q, k + q, v + q).square().sum())(q)


def test_none_chooses_the_backend():
    """Triton for halves and fp32 on a GPU, tiled everywhere else."""
    from image_local_attention import backends

    def chosen(device, dtype, depth=16):
        return backends.resolve(None, torch.device(device), dtype, depth).__name__.rpartition(".")[2]

    assert {chosen("cpu", dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)} == {
        "tiled"
    }
    if CUDA:
        assert {chosen("cuda", dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)} == {"kernels"}
        assert chosen("cuda", torch.float64) == chosen("cuda", torch.float32, 257) == "tiled"


@pytest.mark.parametrize("target", [t.param() for t in TARGETS if t.device == "cuda" and t.backend == "triton"])
def test_cuda_graphs_replay(target):
    x = [m.detach() for m in maps(target.device)]
    wanted = call("attention", *x, backend=target.backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call("attention", *x, backend=target.backend)
    got.zero_()
    graph.replay()
    assert torch.equal(got, wanted)
