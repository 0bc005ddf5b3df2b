"""The registered operators: opcheck, fakes, autocast, modes, and which backend computes them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from calls import BEYOND, HEADS, KERNEL, OPERATORS, OPTIONS, PLAIN, Options, arguments
from conftest import CUDA, TARGETS
from image_local_attention import backends, local_aggregate, local_attention, local_similarity, ops

operators = pytest.mark.parametrize("operator", OPERATORS)
samples = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
REGISTERED = ("attention", "attention_backward", "similarity", "aggregate", "aggregate_transpose", "bias_gradient")

QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


def detached(tensors) -> list[torch.Tensor]:
    return [x.detach() for x in tensors]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(target, name, layout):
    if target.interpreted and layout != "sliced":
        pytest.skip("the interpreter is slow")
    size = (2, 3) if target.interpreted else (6, 7)
    options = Options("zeros" if name in ("similarity", "bias_gradient") else "mask", queries=size, keys=size)
    inputs = arguments(options, target.device, target.backend, layout)[name]
    torch.library.opcheck(getattr(ops, name), inputs, **({"test_utils": QUICK} if target.interpreted else {}))


@pytest.mark.parametrize("options", BEYOND.values(), ids=BEYOND)
@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck_with_options(target, name, options):
    if target.interpreted and name in ("attention_backward", "bias_gradient") and options != BEYOND["shift"]:
        pytest.skip("the interpreter is slow")
    inputs = arguments(options, target.device, target.backend, "contiguous")[name]
    torch.library.opcheck(getattr(ops, name), inputs, **({"test_utils": QUICK} if target.interpreted else {}))


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
    options = OPTIONS["shift"]
    x = options.inputs("cpu")
    with Arguments() as seen:
        out = sum(options.call(operator, *x, backend="reference").sum() for operator in OPERATORS)
        torch.set_float32_matmul_precision("highest")  # the backward keeps the forward's
        torch.autograd.grad(out, x)
    assert set(REGISTERED) == {name for name, _ in seen.calls}
    assert {args[-2] for _, args in seen.calls} == {wanted}


@operators
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_takes_the_users_dtype(target, operator, half):
    if target.interpreted and half == torch.bfloat16:
        pytest.skip("the interpreter's bf16 products are not those of a GPU")
    options = OPTIONS["plain" if target.backend == "triton" else "globe"]
    x = options.inputs(target.device)
    mixed = [m.to(half) if i % 2 == 0 else m for i, m in enumerate(x)]
    with torch.autocast(target.device, dtype=half):
        got, again = (options.call(operator, *m, backend=target.backend) for m in (x, mixed))
    wanted = options.call(operator, *(m.detach().to(half) for m in x), backend=target.backend)
    assert got.dtype == again.dtype == half
    assert torch.equal(got, wanted)
    assert torch.equal(again, wanted)
    used = {"attention": x, "similarity": x[:2] + x[3:], "aggregate": x[:3:2]}[operator]
    finite = got.float().masked_fill(got == float("-inf"), 0.0)
    for grad in torch.autograd.grad(finite.square().sum(), used):
        assert grad.dtype == torch.float32
        assert grad.abs().sum() > 0


@operators
def test_autocast_leaves_fp64_alone(operator):
    options = OPTIONS["shift"]
    x = options.inputs("cpu", dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert options.call(operator, *x, backend="reference").dtype == torch.float64


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@operators
def test_without_gradients(target, operator, mode):
    x = detached(PLAIN.maps(target.device))
    wanted = PLAIN.call(operator, *x, backend=target.backend)
    with mode():
        got = PLAIN.call(operator, *x, backend=target.backend)
    assert not got.requires_grad
    assert torch.equal(got, wanted)


@samples
@operators
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_fake_tensors_know_shape_dtype_and_format(operator, layout, dtype, options):
    more = {"return_lse": True} if operator == "attention" else {}
    x = detached(options.inputs("cpu", layout, dtype))
    real = options.call(operator, *x, backend="reference", **more)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = options.call(operator, *(mode.from_tensor(m) for m in x), backend="reference", **more)
    for got, want in zip(fake, real, strict=True) if more else [(fake, real)]:
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


@samples
def test_meta_tensors_know_shapes_and_have_gradients(options):
    x, real = options.inputs("meta", "channels_last"), options.inputs("cpu", "channels_last")
    for operator in OPERATORS:
        got, want = options.call(operator, *x), options.call(operator, *real, backend="reference")
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
        grads = torch.autograd.grad(got.sum(), x, allow_unused=True)
        used = [(g, m) for g, m in zip(grads, x, strict=True) if g is not None]
        assert len(used) >= 2
        assert all(g.shape == m.shape for g, m in used)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("batch", "height"), [(0, 6), (2, 0)])
def test_what_nothing_looks_at_has_gradients_of_zero(target, batch, height):
    query, key, value = (torch.ones(batch, 4, h, 7, device=target.device) for h in (height, 6, 6))
    weight, key, value = torch.ones(batch, HEADS, height, 7, 12), key.requires_grad_(), value.requires_grad_()
    bias = torch.ones(HEADS, 12, device=target.device).requires_grad_()
    plain = {"heads": HEADS, "backend": target.backend}
    for result, inputs in (
        (local_attention(query, key, value, KERNEL, bias=bias, **plain), (key, value, bias)),
        (local_similarity(query, key, KERNEL, bias=bias, **plain), (key, bias)),
        (local_aggregate(weight.to(target.device), value, KERNEL, **plain), (value,)),
    ):
        assert result.numel() == 0
        for grad, x in zip(torch.autograd.grad(result.sum(), inputs), inputs, strict=True):
            assert torch.equal(grad, torch.zeros_like(x))


def test_none_chooses_the_backend():
    """Triton for halves and fp32 on a GPU, tiled everywhere else."""

    def chosen(device, dtype, depth=16):
        return backends.resolve(None, torch.device(device), dtype, depth).__name__.rpartition(".")[2]

    dtypes = torch.float16, torch.bfloat16, torch.float32
    assert {chosen("cpu", dtype) for dtype in (*dtypes, torch.float64)} == {"tiled"}
    if CUDA:
        assert {chosen("cuda", dtype) for dtype in dtypes} == {"kernels"}
        assert chosen("cuda", torch.float64) == chosen("cuda", torch.float32, 257) == "tiled"


@pytest.mark.parametrize("target", [t.param() for t in TARGETS if t.device == "cuda"])
def test_cuda_graphs_replay(target):
    options = OPTIONS["shift"]
    if target.backend == "reference":
        pytest.skip("it makes its index tables as it goes")
    x = detached(options.inputs(target.device))
    wanted = options.call("attention", *x, backend=target.backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = options.call("attention", *x, backend=target.backend)
    got.zero_()
    graph.replay()
    assert torch.equal(got, wanted)
