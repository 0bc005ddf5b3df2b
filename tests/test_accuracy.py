"""Random problems against the oracle, within twice the error of plain PyTorch in the same dtype."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import oracle
import plain
from budget import Rounding, assert_pixels_within, assert_within
from image_local_attention import local_aggregate, local_attention, local_similarity
from image_local_attention.bench import unfold
from problems import Problem, for_each, problems

COUNTS = {"reference": 10, "tiled": 20, "triton": 20}  # problems of each operator and dtype in `make test`


@dataclass(frozen=True)
class Operator:
    """A public operator, its plain twin, and what the oracle says of both."""

    inputs: tuple[str, ...]
    results: tuple[str, ...]
    ours: Callable
    plain: Callable
    exact: Callable
    exact_gradients: Callable


def attention_and_lse(*args, **kwargs):
    return local_attention(*args, return_lse=True, **kwargs)


ATTENTION = Operator(
    ("query", "key", "value", "bias"),
    ("out", "lse"),
    attention_and_lse,
    plain.attention,
    oracle.attention,
    oracle.attention_gradients,
)
SIMILARITY = Operator(
    ("query", "key", "bias"),
    ("weight",),
    local_similarity,
    plain.similarity,
    oracle.similarity,
    oracle.similarity_gradients,
)
AGGREGATE = Operator(
    ("weight", "value"),
    ("out",),
    local_aggregate,
    plain.aggregate,
    oracle.aggregate,
    oracle.aggregate_gradients,
)


@pytest.mark.hunt
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("operator", [ATTENTION, SIMILARITY, AGGREGATE], ids=["attention", "similarity", "aggregate"])
def test_random_problems(operator, target, dtype):
    # The interpreter takes its time.
    strategy = problems(largest=7, deepest=20, most=2) if target.interpreted else problems()
    name = f"{operator.inputs} {target} {dtype}"
    for_each(strategy, COUNTS[target.backend], name, lambda problem: check(operator, problem, target, dtype))


@pytest.mark.parametrize("kernel", [(3, 3), (7, 7), (4, 6), (1, 9)], ids=str)
def test_fp32_is_the_baseline_to_a_hundred_thousandth(target, kernel):
    """Of the largest number, for the results and gradients of the code that the benchmarks compare with."""
    size = (2, 6, 9, 8) if target.interpreted else (2, 33, 24, 20)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (0.5 * torch.randn(size, generator=generator).to(target.device) for _ in range(4))
    maps = [x.requires_grad_() for x in (q, k, v)]

    def fused(*maps):
        return local_attention(*maps, kernel, backend=target.backend)

    def unfused(*maps):
        weight = local_similarity(*maps[:2], kernel, backend=target.backend)
        return local_aggregate(weight.softmax(-1), maps[2], kernel, backend=target.backend)

    baseline = unfold.unfold_attention(*maps, *kernel)
    wanted = baseline, *torch.autograd.grad(baseline, maps, grad)
    for ours in (fused, unfused):
        out = ours(*maps)
        for got, x in zip((out, *torch.autograd.grad(out, maps, grad)), wanted, strict=True):
            torch.testing.assert_close(got, x, rtol=0, atol=1e-5 * x.abs().max().item())


def check(operator: Operator, problem: Problem, target, dtype) -> None:
    """Results and gradients are within their budgets and in the memory format of the map they belong to."""
    inputs, upstream = numbers(operator, problem, dtype, target.device)
    wanted = [name for name, want in zip(operator.inputs, problem.wanted, strict=False) if want and name in inputs]
    options = asked(operator, problem, target.device)

    def ours(**maps):
        scale = {} if operator is AGGREGATE else {"scale": problem.scale}
        return operator.ours(**maps, kernel_size=problem.kernel, backend=target.backend, **options | scale)

    got = run(ours, operator, inputs, upstream, wanted)
    usual = plain_results(operator, inputs, upstream, wanted, problem)
    exact = exact_results(operator, inputs, upstream, problem)
    if dtype.itemsize == 2 and "lse" in got:  # which is fp32, and as exact
        as_fp32 = {name: x.float() for name, x in inputs.items()}
        usual["lse"] = plain_results(operator, as_fp32, upstream, [], problem)["lse"]
    for name, x in got.items():
        assert_within(name, x, usual[name], exact[name], torch.finfo(x.dtype).eps)
        if name.startswith("gradient") and x.dim() == 4:
            assert_pixels_within(name, x, usual[name], exact[name], torch.finfo(x.dtype).eps)
    assert_formats(operator, got, inputs, upstream)


def numbers(operator: Operator, problem: Problem, dtype, device):
    """The operator's inputs by name, and gradients of its results, None where the loss does not use one."""
    query, key, value, grad = problem.maps(dtype, device)
    weight, grad_weight = problem.weights(dtype, device)
    bias = problem.bias_numbers(dtype, device)
    every = {"query": query, "key": key, "value": value, "weight": weight, "bias": bias}
    grads = {"out": grad, "lse": problem.lse_gradient(dtype, device), "weight": grad_weight}
    if operator is ATTENTION and problem.used != "both":
        grads["lse" if problem.used == "out" else "out"] = None
    inputs = {name: every[name] for name in operator.inputs if every[name] is not None}
    return inputs, [grads[name] for name in operator.results]


def asked(operator: Operator, problem: Problem, device) -> dict:
    """The options of a problem, as plain code takes them."""
    if operator is AGGREGATE:
        return problem.geometry
    return problem.geometry | {"scale": problem.factor, "key_mask": problem.mask(device)}


def run(function, operator: Operator, inputs, upstream, wanted) -> dict:
    """Results and wanted gradients by name."""
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    results = function(**leaves)
    results = results if isinstance(results, tuple) else (results,)
    named = dict(zip(operator.results, results, strict=True))
    used = [(x, g.to(x.dtype)) for x, g in zip(results, upstream, strict=True) if g is not None and x.requires_grad]
    grads = [torch.zeros_like(leaves[name]) for name in wanted]  # the log-sum-exp does not depend on the value
    if used:
        losses, weights = zip(*used, strict=True)
        sources = [leaves[name] for name in wanted]
        grads = torch.autograd.grad(losses, sources, weights, allow_unused=True, materialize_grads=True)
    return named | {f"gradient of {name}": x for name, x in zip(wanted, grads, strict=True)}


def plain_results(operator: Operator, inputs, upstream, wanted, problem: Problem) -> dict:
    """What plain code gives, by name: in the dtype as it is, then with random roundings, more often for few numbers."""
    query = inputs[operator.inputs[0]]

    def usual(options, **maps):
        return operator.plain(**maps, kernel=problem.kernel, **options)

    options = asked(operator, problem, query.device)
    draws = [run(functools.partial(usual, options), operator, inputs, upstream, wanted)]
    inputs = {name: wide(x) for name, x in inputs.items()}
    upstream = [g if g is None else wide(g) for g in upstream]
    options = asked(operator, problem, "cpu")
    if operator is ATTENTION:
        options["softmax"] = plain.softmax_in_steps
    for seed in range(max(3, min(16, 512 // problem.queries))):
        with Rounding(torch.finfo(query.dtype).eps, seed):
            draws.append(run(functools.partial(usual, options), operator, inputs, upstream, wanted))
    return {name: [draw[name] for draw in draws] for name in draws[0]}


def exact_results(operator: Operator, inputs, upstream, problem: Problem) -> dict:
    """What the oracle says, by name; gradients of what the operator was given."""
    maps = {name: wide(x).numpy() for name, x in inputs.items()}
    options = asked(operator, problem, "cpu") | {"kernel": problem.kernel}
    if options.get("key_mask") is not None:
        options["key_mask"] = options["key_mask"].numpy()
    answers = operator.exact(**maps, **options)
    answers = answers if isinstance(answers, tuple) else (answers,)
    grads = [np.zeros(x.shape) if g is None else wide(g).numpy() for x, g in zip(answers, upstream, strict=True)]
    gradients = operator.exact_gradients(*grads, **maps, **options)
    gradients = [x for x in gradients if x is not None]  # that of a bias is None where there is none
    named = zip(operator.results, answers, strict=True)
    named = [*named, *zip((f"gradient of {name}" for name in inputs), gradients, strict=True)]
    return {name: torch.from_numpy(x) for name, x in named}


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to("cpu", torch.float64)


def assert_formats(operator: Operator, got: dict, inputs: dict, upstream: list) -> None:
    """Maps are channels_last where the map they follow is, and contiguous where not, as all weights are."""
    if operator is ATTENTION:
        followed = {"out": "query", **{f"gradient of {name}": name for name in inputs if name != "bias"}}
    elif operator is SIMILARITY:
        followed = {"gradient of query": "key", "gradient of key": "query"}
    else:
        followed = {"out": "value", "gradient of value": "gradient"}
        inputs = inputs | {"gradient": upstream[0]}
    for name, x in got.items():
        wanted = torch.contiguous_format
        if name in followed:
            origin = inputs[followed[name]]
            if not origin.is_contiguous() and origin.is_contiguous(memory_format=torch.channels_last):
                wanted = torch.channels_last
        assert x.is_contiguous(memory_format=wanted), f"{name}: strides {x.stride()}, wanted {wanted}"
