"""What must hold whatever the numbers: each law against another definition, or against the operators themselves."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from conftest import TARGETS
from image_local_attention import local_aggregate, local_attention, local_similarity
from problems import LAYOUTS, lay_out

pytestmark = pytest.mark.usefixtures("poison")

KERNELS = [(3, 3), (2, 4), (5, 1)]
BORDERS = ["zeros", "mask"]
borders = pytest.mark.parametrize("border", BORDERS)
kernels = pytest.mark.parametrize("kernel", KERNELS, ids=str)


def normal(*shape: int, device: str, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def three_maps(device: str, dtype=torch.float32, size=(2, 6, 7, 8)) -> list[torch.Tensor]:
    return [normal(*size, device=device, dtype=dtype, seed=seed) for seed in range(3)]


def counts(size: tuple[int, int], kernel: tuple[int, int]) -> torch.Tensor:
    """How many keys in the map each query sees."""

    def axis(length, k):
        return torch.tensor([min(length, q - k // 2 + k) - max(0, q - k // 2) for q in range(length)])

    return axis(size[0], kernel[0])[:, None] * axis(size[1], kernel[1])


@kernels
def test_weights_sum_to_one(target, dtype, kernel):
    """Outside of the map too, where it is zeros: of its share nothing arrives."""
    q, k, _ = three_maps(target.device, dtype)
    ones = torch.ones_like(q)
    masked = local_attention(q, k, ones, kernel, heads=2, border="mask", backend=target.backend)
    torch.testing.assert_close(masked, ones)
    none = torch.zeros_like(q)  # all weights are alike
    share = counts((7, 8), kernel).to(target.device) / (kernel[0] * kernel[1])
    zeros = local_attention(none, k, ones, kernel, heads=2, border="zeros", backend=target.backend)
    torch.testing.assert_close(zeros, share.to(dtype).expand_as(ones))


@borders
def test_no_scale_is_the_mean_of_the_window(target, dtype, border):
    q, k, v = three_maps(target.device, dtype)
    out = local_attention(q, k, v, (3, 5), heads=3, scale=0.0, border=border, backend=target.backend)
    mean = F.avg_pool2d(v.double(), (3, 5), stride=1, padding=(1, 2), count_include_pad=border == "zeros")
    torch.testing.assert_close(out, mean.to(dtype))


@borders
def test_no_scale_in_the_unfused_operators(target, border):
    q, k, _ = three_maps(target.device)
    weight = local_similarity(q, k, 3, heads=2, scale=0.0, border=border, backend=target.backend)
    assert set(weight.flatten().tolist()) == ({0.0} if border == "zeros" else {0.0, float("-inf")})


@pytest.mark.parametrize("kernel", [(13, 15), (14, 16), (20, 31)], ids=str)
def test_a_window_over_the_whole_map_is_full_attention(target, dtype, kernel):
    maps = [x.requires_grad_() for x in three_maps(target.device, dtype)]
    got = local_attention(*maps, kernel, heads=2, scale=None, border="mask", backend=target.backend)
    wide = [x.detach().double().requires_grad_() for x in maps]
    q, k, v = (x.unflatten(1, (2, -1)).flatten(3).transpose(2, 3) for x in wide)
    full = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(got.shape)
    assert_near(got, full)
    grad = normal(*got.shape, device=target.device, dtype=dtype, seed=9)
    grads = zip(torch.autograd.grad(got, maps, grad), torch.autograd.grad(full, wide, grad.double()), strict=True)
    for ours, theirs in grads:
        assert_near(ours, theirs)


def assert_near(got: torch.Tensor, exact: torch.Tensor) -> None:
    """Within some roundings of the largest number."""
    allowed = 16 * torch.finfo(got.dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(got.double(), exact, atol=allowed, rtol=0)


@kernels
@borders
def test_fused_is_unfused(target, kernel, border):
    q, k, v = three_maps(target.device)
    options = {"heads": 3, "border": border, "backend": target.backend}
    out, lse = local_attention(q, k, v, kernel, scale=0.4, return_lse=True, **options)
    logits = local_similarity(q, k, kernel, scale=0.4, **options)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(out, local_aggregate(logits.softmax(-1), v, kernel, **options))


@kernels
@borders
def test_shifted_maps_give_shifted_results_away_from_the_border(target, kernel, border):
    maps = [x.requires_grad_() for x in three_maps(target.device, size=(1, 4, 14, 13))]
    (down, right), (h, w) = (2, 3), (14, 13)
    inner = slice(down + 4, h - 4), slice(right + 4, w - 4)  # no window of these leaves the cut map

    def attend(*maps):
        return local_attention(*maps, kernel, heads=2, border=border, backend=target.backend)

    def focus(x):
        return x[:, :, inner[0], inner[1]]

    whole = focus(attend(*maps))
    cut = attend(*(x[:, :, down:, right:] for x in maps))
    cut = focus(F.pad(cut, (right, 0, down, 0)))
    torch.testing.assert_close(whole, cut)
    for ours, theirs in zip(*(torch.autograd.grad(x.square().sum(), maps) for x in (whole, cut)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_touch_exactly_the_window(target):
    """The gradient of one output pixel, in the corners and inside, for windows that lean and that leave the map."""
    h, w = 6, 7
    pixels = [(h - 1, w - 1), (3, 3)] + ([] if target.interpreted else [(0, 0), (0, w - 1), (2, 5)])
    for kernel, border, (y, x) in itertools.product(KERNELS, BORDERS, pixels):
        maps = [x.requires_grad_() for x in three_maps(target.device, size=(2, 4, h, w))]
        out = local_attention(*maps, kernel, heads=2, border=border, backend=target.backend)
        q, k, v = torch.autograd.grad(out[1, 0:2, y, x].sum(), maps)
        (top, left), (bottom, right) = (
            (y - kernel[0] // 2, x - kernel[1] // 2),
            (y + (kernel[0] + 1) // 2, x + (kernel[1] + 1) // 2),
        )
        window = torch.zeros(h, w, dtype=torch.bool, device=target.device)
        window[max(0, top) : bottom, max(0, left) : right] = True
        pixel = torch.zeros_like(window)
        pixel[y, x] = True
        for grad, where in ((q, pixel), (k, window), (v, window)):
            assert not grad[0].any(), "another image"
            assert not grad[1, 2:].any(), "another head"
            assert torch.equal(grad[1, :2].ne(0).all(0), where), (kernel, border, y, x)
            assert torch.equal(grad[1, :2].ne(0).any(0), where), (kernel, border, y, x)


def test_unfused_gradients_touch_exactly_the_window(target):
    q, k, v = (x.requires_grad_() for x in three_maps(target.device, size=(1, 2, 6, 7)))
    window = torch.zeros(6, 7, dtype=torch.bool, device=target.device)
    window[2:4, 2:6] = True  # of the pixel (3, 4) under a kernel of (2, 4)
    weight = local_similarity(q, k, (2, 4), backend=target.backend)
    grad_q, grad_k = torch.autograd.grad(weight[0, 0, 3, 4].sum(), (q, k))
    assert torch.equal(grad_k[0, 0].ne(0), window)
    assert grad_q[0, 0].nonzero().tolist() == [[3, 4]]
    weight = weight.detach().requires_grad_()
    out = local_aggregate(weight, v, (2, 4), backend=target.backend)
    grad_weight, grad_v = torch.autograd.grad(out[0, 0, 3, 4], (weight, v))
    assert torch.equal(grad_v[0, 0].ne(0), window)
    assert {tuple(i[2:4]) for i in grad_weight.nonzero().tolist()} == {(3, 4)}
    assert grad_weight[0, 0, 3, 4].ne(0).all()


@kernels
def test_one_slot_of_weights_shifts_the_map(target, dtype, kernel):
    """Exactly: every slot picks its key, zeros outside the map."""
    v = normal(2, 6, 5, 7, device=target.device, dtype=dtype)
    for slot, (i, j) in enumerate(itertools.product(*map(range, kernel))):
        weight = torch.zeros(2, 3, 5, 7, kernel[0] * kernel[1], device=target.device, dtype=dtype)
        weight[..., slot] = 1
        got = local_aggregate(weight, v, kernel, heads=3, backend=target.backend)
        big = F.pad(v, (8, 8, 8, 8))
        y, x = 8 - kernel[0] // 2 + i, 8 - kernel[1] // 2 + j
        # A product in three passes keeps 11 bits of a number and 11 of what they leave: 2**-24 of it is lost.
        in_passes = target.backend == "triton" and dtype == torch.float32
        torch.testing.assert_close(got, big[:, :, y : y + 5, x : x + 7], rtol=2**-23 if in_passes else 0, atol=0)


def test_weights_of_keys_outside_the_map_are_not_read(target):
    v = normal(1, 4, 5, 6, device=target.device).requires_grad_()
    inside = local_similarity(torch.zeros_like(v), torch.zeros_like(v), 4, border="mask", backend="reference") == 0
    weight = normal(*inside.shape, device=target.device)
    results = []
    for outside in (0.0, float("nan"), float("inf")):
        w = weight.where(inside, torch.full_like(weight, outside)).requires_grad_()
        out = local_aggregate(w, v, 4, backend=target.backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (w, v))))
    for zeros, nan, inf in zip(*results, strict=True):
        assert zeros.isfinite().all()
        assert torch.equal(zeros, nan)
        assert torch.equal(zeros, inf)
    assert not results[0][1][~inside].any()


def test_heads_and_images_do_not_meet(target):
    q, k, v = three_maps(target.device)
    together = local_attention(q, k, v, 3, heads=3, backend=target.backend)
    for image, head in itertools.product(range(2), range(3)):
        parts = [x[image : image + 1, 2 * head : 2 * head + 2] for x in (q, k, v)]
        alone = local_attention(*parts, 3, backend=target.backend)
        torch.testing.assert_close(together[image : image + 1, 2 * head : 2 * head + 2], alone)


def test_a_constant_on_all_logits_changes_the_log_sum_exp_only(target):
    q, k, v = three_maps(target.device)
    one = torch.ones_like(q[:, :1])
    out, lse = local_attention(q, k, v, (3, 4), border="mask", return_lse=True, backend=target.backend)
    for constant in (-80.0, 90.0):
        more = torch.cat((q, one), 1), torch.cat((k, constant * one), 1)
        shifted = local_attention(*more, v, (3, 4), border="mask", return_lse=True, backend=target.backend)
        torch.testing.assert_close(shifted[0], out, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(shifted[1], lse + constant)


@borders
def test_huge_logits_choose_one_key(target, border):
    """Each query is alike to one key of its window alone: no exponential overflows."""
    q = torch.ones(1, 1, 6, 7, device=target.device).requires_grad_()
    k = torch.arange(42.0, device=target.device).view(1, 1, 6, 7).requires_grad_()
    v = normal(1, 1, 6, 7, device=target.device).requires_grad_()
    out, lse = local_attention(q, k, v, 3, scale=1e4, border=border, return_lse=True, backend=target.backend)
    last = F.pad(v, (0, 1, 0, 1), mode="replicate")[:, :, 1:, 1:]
    torch.testing.assert_close(out, last)
    torch.testing.assert_close(lse, F.pad(k, (0, 1, 0, 1), mode="replicate")[:, :, 1:, 1:] * 1e4)
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    assert all(x.isfinite().all() for x in grads)


@borders
def test_tiny_logits_under_zeros_lose_to_the_border(target, border):
    q = torch.ones(1, 1, 4, 4, device=target.device)
    v = normal(1, 1, 4, 4, device=target.device)
    out, lse = local_attention(q, -q, v, 3, scale=1e4, border=border, return_lse=True, backend=target.backend)
    rim = torch.ones(4, 4, dtype=torch.bool, device=target.device)
    rim[1:-1, 1:-1] = False
    assert out.isfinite().all()
    if border == "zeros":  # a query at the rim sees logits of 0 outside, which outweigh all others
        assert not out[..., rim].any()
        assert lse[..., rim].min() > 1.0
    assert lse[..., ~rim].max() < -9e3


@pytest.mark.parametrize("border", ["zeros", "shift", "reflect"])
def test_the_weight_of_a_key_alone_does_not_move(target, dtype, border):
    """It is 1 whatever the logit: the kernels have no gradient of query and key, to the bit."""
    if target.backend != "triton":
        pytest.skip("is as exact as plain code")
    q, k, v = (x.requires_grad_() for x in three_maps(target.device, dtype))
    out = local_attention(q, k, v, 1, heads=2, border=border, backend=target.backend)
    of_query, of_key, of_value = torch.autograd.grad(out, (q, k, v), v.detach())
    assert not of_query.any()
    assert not of_key.any()
    torch.testing.assert_close(of_value, v.detach())


@pytest.fixture(params=[False, True], ids=["", "deterministic"])
def deterministic(request):
    """Whether torch is to refuse what may differ from run to run, and to fill fresh memory."""
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


REPEATED = {  # with options that fold keys, share heads or sum over pixels
    "zeros": {"border": "zeros"},
    "folds": {"border": ("replicate", "circular"), "dilation": (1, 2), "kv_heads": 1},
    "shift": {"border": "shift", "bias": (9, 9)},
    "raster": {"border": "mask", "causal": "raster", "bias": (5, 5)},
}


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("options", REPEATED.values(), ids=REPEATED)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_are_repeatable_bit_for_bit(target, dtype, options, layout):
    """100 runs of the kernels on a GPU, where programs run in any order."""
    if target.interpreted:
        pytest.skip("one program after the other")
    size = (2, 8, 19, 21)
    q, k, v = (lay_out(x, layout).requires_grad_() for x in three_maps(target.device, dtype, size))
    options = {"heads": 2, "backend": target.backend} | options
    inputs = [q, k, v] if "kv_heads" not in options else [q, k[:, : size[1] // 2], v[:, : size[1] // 2]]
    shape = options.pop("bias", None)
    bias = None if shape is None else normal(2, *shape, seed=5, device=target.device, dtype=dtype).requires_grad_()

    def once():
        out, lse = local_attention(*inputs, 5, return_lse=True, bias=bias, **options)
        weight = local_similarity(*inputs[:2], 5, bias=bias, **options)
        weight = weight.masked_fill(weight.isinf(), 0.0)
        unfused = local_aggregate(weight, inputs[2], 5, **options)
        loss = out.float().square().sum() + lse.float().sum() + unfused.float().square().sum()
        return out, lse, unfused, *torch.autograd.grad(loss, [q, k, v] + ([] if bias is None else [bias]))

    first = once()
    for _ in range(100 if target.device == "cuda" and target.backend == "triton" else 3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize("target", [t.param() for t in TARGETS if t.backend == "triton"])
def test_a_key_that_every_query_sees_sums_up_as_if_rounded_once(target):
    """4096 terms, all but the first less than half of a rounding of the sum, block by block too."""
    weight = torch.full((1, 1, 64, 64, 1), 2.0**-6, device=target.device)
    weight[0, 0, 0, 0] = 2.0**24
    value = torch.ones(1, 1, 1, 1, device=target.device, requires_grad=True)
    out = local_aggregate(weight, value, 1, backend=target.backend)
    (got,) = torch.autograd.grad(out.sum(), value)
    assert abs(got.item() - weight.double().sum().item()) <= 2.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_changes_the_result(target, layout):
    def results(*maps):
        maps = [x.requires_grad_() for x in maps]
        out, lse = local_attention(*maps, (3, 4), heads=2, return_lse=True, backend=target.backend)
        return out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), maps)

    maps = three_maps(target.device)
    if layout == "expanded":
        maps = [x[:1].expand_as(x) for x in maps]
    wanted = results(*(x.contiguous() for x in maps))
    got = results(*(lay_out(x, layout) for x in maps))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [(0, 4, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0), (0, 4, 0, 0)], ids=str)
def test_nothing_in_nothing_out(target, size):
    maps = [torch.zeros(size, device=target.device).requires_grad_() for _ in range(3)]
    q, k, v = maps
    out, lse = local_attention(*maps, 3, heads=2, return_lse=True, backend=target.backend)
    weight = local_similarity(q, k, 3, heads=2, backend=target.backend)
    assert out.shape == local_aggregate(weight, v, 3, heads=2, backend=target.backend).shape == size
    assert lse.shape == (size[0], 2, *size[2:])
    assert weight.shape == (*lse.shape, 9)
    loss = out.sum() + lse.sum() + local_aggregate(weight, v, 3, heads=2, backend=target.backend).sum()
    assert loss == 0
    assert [x.shape for x in torch.autograd.grad(loss, maps)] == [size] * 3


def test_poison_is_in_uninitialised_memory():
    x = torch.zeros(3)
    for empty in (torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((3,), (2,))):
        assert empty.isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
