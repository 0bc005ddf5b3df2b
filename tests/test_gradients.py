"""Derivatives and their derivatives against finite differences in fp64.

Gradients of random problems are judged with their results, in `test_accuracy`.
"""

from dataclasses import dataclass, field

import pytest
import torch

import plain
from budget import Rounding, assert_within
from conftest import TARGETS
from image_local_attention import local_aggregate, local_attention, local_similarity
from problems import lay_out

pytestmark = pytest.mark.usefixtures("poison")

in_fp64 = pytest.mark.parametrize("target", [t.param() for t in TARGETS if torch.float64 in t.dtypes])


@dataclass(frozen=True)
class Case:
    """A call: the kernel, options of every operator, and what makes its maps. Queries are 3 x 4 pixels."""

    kernel: tuple[int, int]
    options: dict = field(default_factory=dict)
    layout: str = "contiguous"
    keys: tuple[int, int] = (3, 4)
    scale: float | None = 1.0
    bias: tuple[int, ...] | None = None  # its shape, less the heads
    hidden: tuple[int, ...] = ()  # pixels of the map that the key mask hides, None: no mask

    @property
    def heads(self) -> int:
        return self.options.get("heads", 1)

    @property
    def kv_heads(self) -> int:
        return self.options.get("kv_heads", self.heads)

    def of_logits(self, device: str) -> dict:
        """Scale and key mask."""
        there = torch.ones(1, self.keys[0] * self.keys[1], dtype=torch.bool)
        there[:, list(self.hidden)] = False
        return {"scale": self.scale, "key_mask": there.view(1, *self.keys).to(device) if self.hidden else None}

    def maps(self, device: str) -> dict:
        """Query, key, a value of more channels, and the bias, if any, by name."""
        depths = {"query": 2, "key": 2, "value": 3}
        maps = {}
        for seed, (name, depth) in enumerate(depths.items()):
            channels = depth * (self.heads if name == "query" else self.kv_heads)
            size = (3, 4) if name == "query" else self.keys
            maps[name] = fp64(1, channels, *size, device=device, layout=self.layout, seed=seed)
        if self.bias is not None:
            maps["bias"] = fp64(self.heads, *self.bias, device=device)
        return maps


CASES = {
    "zeros": Case((3, 3)),
    "mask": Case((2, 4), {"heads": 2, "border": "mask"}, "channels_last", scale=None),
    "slices": Case((1, 5), {"heads": 2}, "sliced", scale=-0.7),
    "beyond the map": Case((5, 7), {"border": "mask"}, "transposed", scale=0.4),
    "bias": Case((3, 3), {"heads": 2}, bias=(3, 3)),
    "shift, bias by displacement": Case((2, 3), {"heads": 2, "border": "shift"}, "channels_last", bias=(3, 5)),
    "dilation within residues": Case((2, 2), {"border": "shift", "dilation": (1, 2)}, keys=(2, 5), bias=(3, 3)),
    "folds, key mask": Case((3, 5), {"border": ("reflect", "circular")}, hidden=(0, 5, 6), bias=(15,)),
    "replicate": Case((4, 5), {"border": "replicate", "dilation": (2, 1)}, "sliced", keys=(2, 3)),
    "shared keys": Case((3, 3), {"heads": 4, "kv_heads": 2, "border": "mask"}, keys=(6, 8), hidden=(1, 20), bias=(9,)),
    "causal": Case((2, 3), {"causal": True, "border": ("zeros", "shift"), "dilation": (1, 2)}, scale=0.3, bias=(6,)),
    "raster": Case((3, 4), {"heads": 2, "kv_heads": 1, "causal": "raster", "border": ("mask", "zeros")}, bias=(12,)),
    "no key": Case((3, 3), {"border": "mask"}, hidden=(0, 1, 4, 5, 8, 9), bias=(3, 3)),
    "another grid, masked": Case((3, 2), {"heads": 2, "border": ("mask", "circular")}, "channels_last", (5, 1), None),
}
SEEING = {name: case for name, case in CASES.items() if name != "no key"}  # a softmax over nothing is NaN
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def fp64(*shape: int, device: str, layout: str = "contiguous", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    return (lay_out(x, layout) if len(shape) == 4 else x).requires_grad_()


def named(function, names):
    """A function of positional tensors, for `gradcheck`, whose infinities are 0: finite differences know none."""

    def finite(*tensors):
        results = function(**dict(zip(names, tensors, strict=True)))
        results = results if isinstance(results, tuple) else (results,)
        return tuple(x.where(x.isfinite(), 0) for x in results)

    return finite


def check_twice(function, maps: dict) -> None:
    function = named(function, maps)
    assert torch.autograd.gradcheck(function, tuple(maps.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(maps.values()), fast_mode=True)


@in_fp64
@cases
def test_attention_and_its_log_sum_exp_twice(target, case):
    options = {"return_lse": True, "backend": target.backend} | case.options | case.of_logits(target.device)
    check_twice(lambda **maps: local_attention(**maps, kernel_size=case.kernel, **options), case.maps(target.device))


@in_fp64
@cases
def test_similarity_twice(target, case):
    maps = case.maps(target.device)
    maps.pop("value")
    options = {"backend": target.backend} | case.options | case.of_logits(target.device)
    check_twice(lambda **maps: local_similarity(**maps, kernel_size=case.kernel, **options), maps)


@in_fp64
@cases
def test_aggregate_twice(target, case):
    weight = fp64(1, case.heads, 3, 4, case.kernel[0] * case.kernel[1], device=target.device)
    maps = {"weight": weight, "value": case.maps(target.device)["value"]}
    options = {"backend": target.backend} | case.options
    check_twice(lambda **maps: local_aggregate(**maps, kernel_size=case.kernel, **options), maps)


@in_fp64
def test_attention_out_of_the_unfused_operators_twice(target):
    case = CASES["mask"]

    def attend(value, **maps):
        options = case.options | {"kernel_size": case.kernel, "backend": target.backend}
        weight = local_similarity(**maps, scale=None, **options)
        return local_aggregate(weight.softmax(-1), value, **options)

    check_twice(attend, case.maps(target.device))


@in_fp64
def test_third_derivatives_are_those_of_plain_code(target):
    case = CASES["shared keys"]
    maps = case.maps(target.device)
    options = case.options | case.of_logits(target.device)

    def third(attention):
        loss = attention(**maps)[0].square().sum()
        for _ in range(3):
            loss = sum(x.sin().sum() for x in torch.autograd.grad(loss, list(maps.values()), create_graph=True))
        return loss

    got = third(
        lambda **x: local_attention(**x, kernel_size=case.kernel, return_lse=True, **options, backend=target.backend)
    )
    wanted = third(lambda **x: plain.attention(**x, kernel=case.kernel, **options))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=0)


def fused_attention(query, key, value, kernel, **options):
    return local_attention(query, key, value, kernel, **options, return_lse=True)


def unfused_attention(query, key, value, kernel, bias=None, key_mask=None, scale=1.0, **options):
    logits = local_similarity(query, key, kernel, bias=bias, key_mask=key_mask, scale=scale, **options)
    return local_aggregate(logits.softmax(-1), value, kernel, **options), logits.logsumexp(-1)


@pytest.mark.parametrize("attention", [fused_attention, unfused_attention], ids=["fused", "unfused"])
@pytest.mark.parametrize("border", ["zeros", "mask"])
def test_second_derivatives_are_as_exact_as_plain_ones(target, dtype, border, attention):
    """What a gradient penalty takes, of both results."""
    kernel, heads = (3, 4), 2
    size = (1, 4, 5, 6) if target.interpreted else (2, 12, 9, 11)
    maps = [fp64(*size, device=target.device, seed=i).detach().to(dtype) for i in range(3)]

    def penalty(attention, maps, **options):
        maps = [x.detach().requires_grad_() for x in maps]
        out, lse = attention(*maps, kernel, heads=heads, scale=0.3, border=border, **options)
        loss = out.square().sum() / out.numel() + lse.square().sum().to(out.dtype) / lse.numel()
        grads = torch.autograd.grad(loss, maps, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in grads), maps)

    got = penalty(attention, maps, backend=target.backend)
    usual, exact_maps = [penalty(plain.attention, maps)], [x.double().cpu() for x in maps]
    exact = penalty(plain.attention, exact_maps)
    for seed in range(3):
        with Rounding(torch.finfo(dtype).eps, seed):
            usual.append(penalty(plain.attention, exact_maps, softmax=plain.softmax_in_steps))
    for name, ours, truth, *theirs in zip(("query", "key", "value"), got, exact, *usual, strict=True):
        assert_within(name, ours, theirs, truth, torch.finfo(dtype).eps)


@in_fp64
@pytest.mark.parametrize("case", SEEING.values(), ids=SEEING)
def test_a_gradient_penalty_is_that_of_the_unfused_operators(target, case):
    maps = case.maps(target.device)
    options = case.options | case.of_logits(target.device) | {"backend": target.backend}

    def penalty(attention):
        out, lse = attention(**maps, kernel=case.kernel, **options)
        grads = torch.autograd.grad(out.square().sum() + lse.sin().sum(), list(maps.values()), create_graph=True)
        loss = out.sum() + sum(x.square().sum() for x in grads)
        return loss, *torch.autograd.grad(loss, list(maps.values()))

    for ours, theirs in zip(penalty(fused_attention), penalty(unfused_attention), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_only_wanted_gradients_come(target):
    q, k, v = (fp64(1, 4, 4, 5, device=target.device).detach().float() for _ in range(3))
    for wanted in (q, k, v):
        for x in (q, k, v):
            x.requires_grad_(x is wanted).grad = None
        local_attention(q, k, v, 3, backend=target.backend).square().sum().backward()
        assert [x.grad is not None for x in (q, k, v)] == [x is wanted for x in (q, k, v)]
        assert wanted.grad.abs().sum() > 0
