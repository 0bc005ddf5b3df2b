"""torch.func and forward mode: every transform of an operator against reverse mode, image by image.

In fp64, or in fp32 where a backend has no fp64.
"""

import pytest
import torch

from calls import BEYOND, OPERATORS, OPTIONS, PLAIN, Options, seeded
from conftest import TARGETS
from image_local_attention import local_attention

forward_ad = torch.autograd.forward_ad
ROUNDINGS = (
    64  # of sums over 12 keys and 2 channels, of their derivatives, and of the reverse mode they are held against
)
operators = pytest.mark.parametrize("operator", OPERATORS)
samples = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
TINY = Options(("mask", "circular"), bias=(12,), masked=True, queries=(2, 3), keys=(2, 3))
targets = pytest.mark.parametrize("target", [t.param() for t in TARGETS if not t.interpreted])
# For what hangs on torch and on whether the backend is ours or plain torch.
devices = pytest.mark.parametrize(
    "target", [t.param() for t in TARGETS if t.backend == "reference" or (t.backend, t.device) == ("triton", "cuda")]
)


def finite(result: torch.Tensor) -> torch.Tensor:
    """What can be summed: logits of keys that do not take part are infinite."""
    return torch.where(result == float("-inf"), 0.0, result)


def dtype_of(target) -> torch.dtype:
    return torch.float64 if torch.float64 in target.dtypes else torch.float32


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for roundings of the largest number."""
    most = wanted.abs().max().item()
    torch.testing.assert_close(got, wanted, rtol=0, atol=ROUNDINGS * torch.finfo(wanted.dtype).eps * most)


def of(operator: str, options: Options, target):
    """The operator as a function of the inputs it reads, and those inputs."""
    x = [m.detach() for m in options.inputs(target.device, dtype=dtype_of(target))]
    read = {"attention": range(len(x)), "similarity": [0, 1, *range(3, len(x))], "aggregate": [0, 2]}[operator]

    def function(*given):
        full = list(x)
        for i, m in zip(read, given, strict=True):
            full[i] = m
        return finite(options.call(operator, *full, backend=target.backend))

    return function, [x[i] for i in read]


def randn_like(tensors, seed: int) -> list[torch.Tensor]:
    generator = seeded(seed)
    return [torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x.device) for x in tensors]


def push(function, inputs, tangents):
    """The directional derivative in reverse mode: the derivative, by the upstream gradient, of what it is pulled to."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    result = function(*inputs)
    upstream = torch.zeros_like(result).requires_grad_()
    pulled = torch.autograd.grad(result, inputs, upstream, create_graph=True)
    return torch.autograd.grad(pulled, upstream, tangents)[0]


@targets
@samples
@operators
def test_forward_mode(operator, options, target):
    function, inputs = of(operator, options, target)
    tangents = randn_like(inputs, 1)
    result, derivative = torch.func.jvp(function, tuple(inputs), tuple(tangents))
    assert_close(result, function(*inputs))
    assert_close(derivative, push(function, inputs, tangents))


@devices
@operators
def test_forward_mode_by_dual_numbers_of_one_input_at_a_time(operator, target):
    function, inputs = of(operator, TINY, target)
    for i, tangent in enumerate(randn_like(inputs, 2)):
        with forward_ad.dual_level():
            x = forward_ad.make_dual(inputs[i], tangent)
            derivative = forward_ad.unpack_dual(function(*inputs[:i], x, *inputs[i + 1 :])).tangent
        tangents = [tangent if j == i else torch.zeros_like(x) for j, x in enumerate(inputs)]
        assert_close(derivative, push(function, inputs, tangents))


@devices
def test_forward_mode_of_the_log_sum_exp(target):
    x = [m.detach() for m in TINY.inputs(target.device, dtype=dtype_of(target))]

    def function(*given):
        return TINY.call("attention", *given, backend=target.backend, return_lse=True)[1]

    tangents = randn_like(x[:2], 3)
    _, derivative = torch.func.jvp(lambda q, k: function(q, k, *x[2:]), tuple(x[:2]), tuple(tangents))
    assert_close(derivative, push(lambda q, k: function(q, k, *x[2:]), x[:2], tangents))


@devices
@operators
def test_a_forward_derivative_of_the_backward(operator, target):
    """The tangent comes by way of the upstream gradient alone; the backward is linear in it."""
    function, inputs = of(operator, PLAIN, target)
    inputs = [x.requires_grad_() for x in inputs]
    (tangent,) = randn_like([function(*inputs)], 4)
    with forward_ad.dual_level():
        result = function(*inputs)
        upstream = forward_ad.make_dual(torch.ones_like(result), tangent)
        grads = torch.autograd.grad(result, inputs, upstream, retain_graph=True)
        derivatives = [forward_ad.unpack_dual(grad).tangent for grad in grads]
    wanted = torch.autograd.grad(result, inputs, tangent)
    for got, want in zip(derivatives, wanted, strict=True):
        assert got is not None
        assert_close(got, want)


@devices
@operators
def test_gradients_of_functions(operator, target):
    function, inputs = of(operator, TINY, target)

    def loss(*given):
        return function(*given).square().sum()

    got = torch.func.grad(loss, tuple(range(len(inputs))))(*inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    for ours, theirs in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert_close(ours, theirs)


@devices
@operators
def test_jacobians_and_hessians_of_both_modes_agree(operator, target):
    function, inputs = of(operator, TINY, target)

    def of_first(x):
        return function(x, *inputs[1:])

    def loss(x):
        return of_first(x).sin().sum()

    first = inputs[0]
    wanted = torch.autograd.functional.jacobian(of_first, first)
    assert_close(torch.func.jacfwd(of_first)(first), wanted)
    assert_close(torch.func.jacrev(of_first)(first), wanted)
    hessian = torch.autograd.functional.hessian(loss, first)
    assert_close(torch.func.hessian(loss)(first), hessian)
    more = {"outer_jacobian_strategy": "forward-mode", "vectorize": True}
    assert_close(torch.autograd.functional.hessian(loss, first, **more), hessian)


@targets
@samples
@operators
def test_vmap_is_a_loop(operator, options, target):
    function, inputs = of(operator, options, target)
    batched = [torch.stack(randn_like([x] * 3, 5 + i), dim=i % 2) for i, x in enumerate(inputs)]
    axes = tuple(i % 2 for i in range(len(inputs)))
    wanted = torch.stack([function(*(x.select(a, n) for x, a in zip(batched, axes, strict=True))) for n in range(3)])
    assert_close(torch.func.vmap(function, axes)(*batched), wanted)
    some = (axes[0], *(None for _ in inputs[1:]))
    wanted = torch.stack([function(batched[0].select(axes[0], n), *inputs[1:]) for n in range(3)])
    assert_close(torch.func.vmap(function, some)(batched[0], *inputs[1:]), wanted)


@devices
@operators
@pytest.mark.parametrize("options", [PLAIN, BEYOND["globe"]], ids=["plain", "globe"])
def test_gradients_for_each_sample(operator, options, target):
    function, inputs = of(operator, options, target)
    batched = [torch.stack(randn_like([x] * 2, 9 + i)) for i, x in enumerate(inputs)]
    positions = tuple(range(len(inputs)))
    gradient = torch.func.grad(lambda *given: function(*given).square().sum(), positions)
    got = torch.func.vmap(gradient)(*batched)
    for n in range(2):
        for ours, theirs in zip(got, gradient(*(x[n] for x in batched)), strict=True):
            assert_close(ours[n], theirs)


@devices
def test_vmap_over_key_masks(target):
    q, k, v = (m.detach() for m in PLAIN.maps(target.device, dtype=dtype_of(target)))
    masks = (torch.rand(3, 2, 6, 7, generator=seeded(6)) > 0.3).to(target.device)

    def attend(key_mask):
        return local_attention(q, k, v, 3, heads=2, key_mask=key_mask, backend=target.backend)

    assert_close(torch.func.vmap(attend)(masks), torch.stack([attend(m) for m in masks]))
