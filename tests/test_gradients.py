"""Derivatives against finite differences in fp64, and derivatives of derivatives of the unfused operators.

Gradients of random problems are judged with their results, in `test_accuracy`.
"""

import numpy as np
import pytest
import torch

import oracle
import plain
from budget import assert_within
from conftest import TARGETS
from image_local_attention import local_aggregate, local_attention, local_similarity
from problems import lay_out

pytestmark = pytest.mark.usefixtures("poison")

in_fp64 = pytest.mark.parametrize("target", [t.param() for t in TARGETS if torch.float64 in t.dtypes])
# kernel, heads, scale, border, layout
CASES = [
    ((3, 3), 1, 1.0, "zeros", "contiguous"),
    ((2, 4), 2, None, "mask", "channels_last"),
    ((1, 5), 2, -0.7, "zeros", "sliced"),
    ((5, 7), 1, 0.4, "mask", "transposed"),
]
cases = pytest.mark.parametrize(("kernel", "heads", "scale", "border", "layout"), CASES, ids=[str(c[0]) for c in CASES])


def fp64(*shape: int, device: str, layout: str = "contiguous") -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    return (lay_out(x, layout) if len(shape) == 4 else x).requires_grad_()


def fp64_maps(device: str, layout: str) -> list[torch.Tensor]:
    """Query, key and a value of more channels."""
    return [fp64(1 + (depth == 6), depth, 3, 4, device=device, layout=layout)[:1] for depth in (4, 4, 6)]


@in_fp64
@cases
def test_attention_and_its_log_sum_exp(target, kernel, heads, scale, border, layout):
    def attend(*maps):
        options = {"heads": heads, "scale": scale, "border": border, "return_lse": True}
        return local_attention(*maps, kernel, backend=target.backend, **options)

    assert torch.autograd.gradcheck(attend, fp64_maps(target.device, layout))


@in_fp64
@cases
def test_similarity_twice(target, kernel, heads, scale, border, layout):
    def finite_logits(*maps):
        options = {"heads": heads, "scale": scale, "border": border}
        weight = local_similarity(*maps, kernel, backend=target.backend, **options)
        return weight.where(weight.isfinite(), 0)  # finite differences know no infinity

    q, k, _ = fp64_maps(target.device, layout)
    assert torch.autograd.gradcheck(finite_logits, (q, k))
    assert torch.autograd.gradgradcheck(finite_logits, (q, k), fast_mode=True)


@in_fp64
@cases
def test_aggregate_twice(target, kernel, heads, scale, border, layout):
    def aggregate(weight, value):
        return local_aggregate(weight, value, kernel, heads=heads, border=border, backend=target.backend)

    weight = fp64(1, heads, 3, 4, kernel[0] * kernel[1], device=target.device)
    value = fp64_maps(target.device, layout)[2]
    assert torch.autograd.gradcheck(aggregate, (weight, value))
    assert torch.autograd.gradgradcheck(aggregate, (weight, value), fast_mode=True)


@in_fp64
def test_attention_out_of_the_unfused_operators_twice(target):
    def attend(q, k, v):
        options = {"heads": 2, "border": "mask", "backend": target.backend}
        weight = local_similarity(q, k, 3, scale=None, **options)
        return local_aggregate(weight.softmax(-1), v, 3, **options)

    maps = fp64_maps(target.device, "contiguous")
    assert torch.autograd.gradcheck(attend, maps)
    assert torch.autograd.gradgradcheck(attend, maps, fast_mode=True)


@pytest.mark.parametrize("border", ["zeros", "mask"])
def test_second_derivatives_are_as_exact_as_plain_ones(target, dtype, border):
    """Of the unfused operators: what a gradient penalty takes."""
    kernel, heads = (3, 4), 2
    size = (1, 4, 5, 6) if target.interpreted else (2, 12, 9, 11)
    maps = [fp64(*size, device=target.device).detach().roll(i, 2).to(dtype) for i in range(3)]

    def penalty(similarity, aggregate, maps, **options):
        q, k, v = maps = [x.detach().requires_grad_() for x in maps]
        weight = similarity(q, k, kernel, heads=heads, scale=0.3, **options)
        out = aggregate(weight, v, kernel, heads=heads, **options)
        grads = torch.autograd.grad(out.square().sum() / out.numel(), maps, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in grads), maps)

    got = penalty(local_similarity, local_aggregate, maps, backend=target.backend)
    usual = penalty(plain.similarity, plain.aggregate, maps)
    exact = penalty(plain.similarity, plain.aggregate, [x.double() for x in maps])
    for name, *results in zip(("query", "key", "value"), got, usual, exact, strict=True):
        ours, theirs, truth = results
        assert_within(name, ours, [theirs], truth, torch.finfo(dtype).eps)


def test_only_wanted_gradients_come(target):
    q, k, v = (fp64(1, 4, 4, 5, device=target.device).detach().float() for _ in range(3))
    for wanted in (q, k, v):
        for x in (q, k, v):
            x.requires_grad_(x is wanted).grad = None
        local_attention(q, k, v, 3, backend=target.backend).square().sum().backward()
        assert [x.grad is not None for x in (q, k, v)] == [x is wanted for x in (q, k, v)]
        assert wanted.grad.abs().sum() > 0


@pytest.mark.parametrize("border", ["zeros", "mask"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 5), (9, 8)], ids=str)
def test_the_oracles_gradients_are_its_differences(kernel, border):
    """The oracle's adjoints against its own forward: central differences along random directions."""
    rng = np.random.default_rng(0)
    options = {"heads": 2, "border": border}
    q, k, v, grad = (rng.standard_normal((2, channels, 3, 4)) for channels in (4, 4, 6, 6))
    weight, grad_weight = (rng.standard_normal((2, 2, 3, 4, kernel[0] * kernel[1])) for _ in range(2))
    grad_lse = rng.standard_normal((2, 2, 3, 4))

    def attention(q, k, v):
        out, lse = oracle.attention(q, k, v, kernel, scale=0.6, **options)
        return (grad * out).sum() + (grad_lse * lse).sum()

    def similarity(q, k):
        logits = oracle.similarity(q, k, kernel, scale=0.6, **options)
        return (grad_weight * np.where(np.isfinite(logits), logits, 0)).sum()

    def aggregate(weight, v):
        return (grad * oracle.aggregate(weight, v, kernel, **options)).sum()

    of_attention = oracle.attention_gradients(grad, grad_lse, q, k, v, kernel, scale=0.6, **options)
    of_similarity = oracle.similarity_gradients(grad_weight, q, k, kernel, scale=0.6, **options)
    of_aggregate = oracle.aggregate_gradients(grad, weight, v, kernel, **options)
    for loss, inputs, gradients in (
        (attention, (q, k, v), of_attention),
        (similarity, (q, k), of_similarity),
        (aggregate, (weight, v), of_aggregate),
    ):
        for i, gradient in enumerate(gradients):
            step = 1e-5 * rng.standard_normal(gradient.shape)
            ahead, behind = ([*inputs[:i], inputs[i] + s, *inputs[i + 1 :]] for s in (step, -step))
            slope = (loss(*ahead) - loss(*behind)) / 2
            np.testing.assert_allclose((gradient * step).sum(), slope, rtol=1e-6, atol=1e-12)
