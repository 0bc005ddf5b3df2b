"""Attention over several sets of keys, merged, is one softmax over all of them."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import TARGETS
from image_local_attention import local_attention, local_similarity, merge

pytestmark = pytest.mark.usefixtures("poison")

in_general = pytest.mark.parametrize("target", [t.param() for t in TARGETS if t.backend != "triton"])
HEADS = 2


def normal(*shape: int, seed: int, device: str) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(device).requires_grad_()


def assert_alike(ours, theirs, leaves) -> None:
    """Pairs (out, lse), and the gradients of the same loss of both."""
    found = []
    for out, lse in (ours, theirs):
        lse = lse.where(lse.isfinite(), 0)
        loss = (out * torch.arange(out.numel(), device=out.device).view_as(out).sin()).sum() + lse.sin().sum()
        found.append((out, lse, *torch.autograd.grad(loss, leaves, retain_graph=True)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@in_general
@pytest.mark.parametrize("border", ["mask", "shift", ("circular", "mask")], ids=str)
@pytest.mark.parametrize("sets", [1, 2, 3])
def test_disjoint_key_masks(target, border, sets):
    maps = [normal(2, 4, 6, 7, seed=seed, device=target.device) for seed in range(3)]
    whose = torch.randint(sets + 1, (2, 6, 7), generator=torch.Generator().manual_seed(1)).to(target.device)
    whose[0] = sets  # nobody's: no key at all in an image
    whose[1, :4] = 0  # a set that some windows do not meet

    def attend(there):
        options = {"heads": HEADS, "border": border, "return_lse": True, "backend": target.backend}
        return local_attention(*maps, (3, 4), key_mask=there, **options)

    together = merge([attend(whose == i) for i in range(sets)])
    assert (together[1][0] == float("-inf")).all()
    assert not together[0][0].any()
    assert_alike(together, attend(whose < sets), maps)


@in_general
@pytest.mark.parametrize("border", ["mask", "zeros"])
def test_two_resolutions(target, border):
    """Fine keys around each pixel and coarse ones around it, against a softmax over both sets of logits."""
    query, fine_key, fine_value = (normal(2, 4, 8, 6, seed=seed, device=target.device) for seed in range(3))
    coarse_key, coarse_value = (normal(2, 4, 4, 3, seed=seed, device=target.device) for seed in (3, 4))
    options = {"heads": HEADS, "border": border, "backend": target.backend}
    levels = ((fine_key, fine_value, (3, 4)), (coarse_key, coarse_value, (3, 3)))
    parts = [local_attention(query, k, v, kernel, return_lse=True, **options) for k, v, kernel in levels]

    logits, values = [], []
    for k, v, kernel in levels:
        logits.append(local_similarity(query, k, kernel, **options))
        values.append(gathered(v, kernel, step=8 // v.shape[2]))
    logits, values = torch.cat(logits, -1), torch.cat(values, -1)  # [B, heads, H, W, n], [B, heads, D, H, W, n]
    out = (logits.softmax(-1)[:, :, None] * values).sum(-1).flatten(1, 2)
    leaves = [query, fine_key, fine_value, coarse_key, coarse_value]
    assert_alike(merge(parts), (out, logits.logsumexp(-1)), leaves)


def gathered(value, kernel, step):
    """[B, heads, D, step*H, step*W, kH*kW]: values around the pixel each query lies in, zeros outside the map."""
    h, w = value.shape[2:]
    padded = F.pad(value, (4, 4, 4, 4))
    slots = []
    for i, j in itertools.product(*map(range, kernel)):
        y, x = 4 - kernel[0] // 2 + i, 4 - kernel[1] // 2 + j
        slots.append(padded[:, :, y : y + h, x : x + w])
    slots = torch.stack(slots, -1).repeat_interleave(step, 2).repeat_interleave(step, 3)
    return slots.unflatten(1, (HEADS, -1))


@in_general
def test_extra_tokens_that_every_pixel_sees(target):
    """Attention to tokens by another program, merged."""
    maps = [normal(2, 4, 5, 6, seed=seed, device=target.device) for seed in range(3)]
    key, value = (normal(2, HEADS, 3, 2, seed=seed, device=target.device) for seed in (3, 4))
    options = {"heads": HEADS, "border": "mask", "backend": target.backend}
    local = local_attention(*maps, 3, return_lse=True, **options)
    of_tokens = torch.einsum("bhdyx,bhtd->bhyxt", maps[0].unflatten(1, (HEADS, -1)), key)
    out = torch.einsum("bhyxt,bhtd->bhdyx", of_tokens.softmax(-1), value).flatten(1, 2)
    logits = torch.cat((local_similarity(*maps[:2], 3, **options), of_tokens), -1)
    tokens = value.transpose(2, 3)[:, :, :, None, None].expand(-1, -1, -1, 5, 6, -1)
    values = torch.cat((gathered(maps[2], (3, 3), 1), tokens), -1)
    wanted = (logits.softmax(-1)[:, :, None] * values).sum(-1).flatten(1, 2)
    assert_alike(merge([local, (out, of_tokens.logsumexp(-1))]), (wanted, logits.logsumexp(-1)), [*maps, key, value])


def test_plain_windows_merge_on_every_backend(target):
    """A map merged with itself: the same output, ln 2 more."""
    maps = [normal(1, 4, 5, 6, seed=seed, device=target.device).detach().float() for seed in range(3)]
    out, lse = local_attention(*maps, 3, heads=HEADS, border="mask", return_lse=True, backend=target.backend)
    twice = merge([(out, lse), (out, lse)])
    torch.testing.assert_close(twice[0], out)
    torch.testing.assert_close(twice[1], lse + math.log(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_half(dtype):
    maps = [normal(1, 4, 5, 6, seed=seed, device="cpu").detach().to(dtype) for seed in range(3)]
    part = local_attention(*maps, 3, heads=HEADS, return_lse=True)
    out, lse = merge([part, part])
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out, part[0])
