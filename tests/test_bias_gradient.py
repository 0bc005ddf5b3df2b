"""The gradient of a bias as the kernels sum it, chunk by chunk and block by block, against the reference."""

import pytest
import torch

from conftest import TARGETS
from image_local_attention import local_attention

grad_bias = pytest.importorskip("image_local_attention.kernels.grad_bias")

TRITON = pytest.mark.parametrize("target", [t.param() for t in TARGETS if t.backend == "triton"])
ERROR = 2**-17  # of the largest entry: sums in fp32 of 2 * 18 * 11 terms of P * (dP - delta)


def gradient(backend: str, maps, bias: torch.Tensor, grad_out: torch.Tensor, kernel, options: dict) -> torch.Tensor:
    bias = bias.detach().requires_grad_()
    out = local_attention(*maps, kernel, bias=bias, backend=backend, **options)
    return torch.autograd.grad(out, bias, grad_out)[0]


def problem(size, kernel, by_displacement: bool, kv_heads: int):
    """Maps, bias and gradient of the output, in fp64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3 * heads, *size) for heads in (2, kv_heads, kv_heads, 2)]
    *maps, grad_out = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    entries = [2 * k - 1 for k in kernel] if by_displacement else kernel
    return maps, torch.randn(2, *entries, generator=generator, dtype=torch.float64), grad_out


def assert_right(target, maps, bias, grad_out, kernel, options) -> None:
    exact = gradient("reference", maps, bias, grad_out, kernel, options)
    there = [x.to(target.device, torch.float32) for x in (*maps, bias, grad_out)]
    got = gradient("triton", there[:3], *there[3:], kernel, options)
    assert (got.cpu().double() - exact).abs().max() <= ERROR * exact.abs().max()


@TRITON
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("sums", [1, 2**16])
@pytest.mark.parametrize(
    ("kernel", "by_displacement", "options"),
    [
        ((4, 5), False, {"border": "mask", "dilation": (1, 2)}),
        ((5, 3), True, {"border": "shift"}),
        ((3, 3), False, {"border": "circular", "kv_heads": 1}),
    ],
    ids=["dilation", "displacement", "circular"],
)
def test_chunks_are_of_no_consequence(target, kernel, by_displacement, options, sums, monkeypatch):
    """One chunk, for there is at least one, and several."""
    chunks, launch = [], grad_bias.Launch.__call__

    def watched(self, kernel, *args, grid=None, **constants):
        chunks.extend(grid[:1] if grid else ())
        launch(self, kernel, *args, grid=grid, **constants)

    monkeypatch.setattr(grad_bias.Launch, "__call__", watched)
    monkeypatch.setattr(grad_bias, "SUMS", sums)
    maps, bias, grad_out = problem((18, 11), kernel, by_displacement, options.get("kv_heads", 2))
    assert_right(target, maps, bias, grad_out, kernel, {"heads": 2} | options)
    assert len(chunks) == 1
    assert (chunks[0] == 1) == (sums == 1)


@TRITON
@pytest.mark.parametrize("by_displacement", [False, True])
def test_the_bias_of_a_key_seen_alone_is_in_the_log_sum_exp_only(target, by_displacement):
    """Its weight is 1 whatever its logit; where a mask leaves it out there is no weight at all."""
    maps, bias, grad_out = problem((18, 11), (1, 1), by_displacement, kv_heads=2)
    *maps, bias, grad_out = (x.to(target.device, torch.float32) for x in (*maps, bias, grad_out))
    bias.requires_grad_()
    key_mask = torch.ones(2, 18, 11, dtype=torch.bool, device=target.device)
    key_mask[:, 5:] = False
    grad_lse = torch.rand(2, 2, 18, 11, device=target.device)
    options = {"heads": 2, "border": "shift" if by_displacement else "zeros", "key_mask": key_mask}
    out, lse = local_attention(*maps, 1, bias=bias, backend="triton", return_lse=True, **options)
    (got,) = torch.autograd.grad(out, bias, grad_out, retain_graph=True)
    assert torch.equal(got, torch.zeros_like(bias))
    (got,) = torch.autograd.grad((out, lse), bias, (grad_out, grad_lse))
    torch.testing.assert_close(got.flatten(), grad_lse[:, :, :5].sum((0, 2, 3)))
