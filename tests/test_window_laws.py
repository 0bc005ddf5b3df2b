"""Laws of what windows may be beyond the plain ones, each against another call or another definition."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F

from conftest import TARGETS
from image_local_attention import local_aggregate, local_attention, local_similarity
from problems import lay_out

pytestmark = pytest.mark.usefixtures("poison")

in_general = pytest.mark.parametrize("target", [t.param() for t in TARGETS if t.backend != "triton"])
MORE = (  # a few options of every kind, for laws that hold whatever they are
    {"border": "zeros", "dilation": (1, 2)},
    {"border": ("shift", "circular")},
    {"border": ("mask", "shift"), "causal": (True, False)},
    {"border": "mask", "causal": "raster"},
    {"border": ("replicate", "reflect"), "dilation": 2},
)
options = pytest.mark.parametrize("options", MORE, ids=str)


def normal(*shape: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def three_maps(device: str, size=(8, 9), queries=None, heads=4, kv_heads=4) -> list[torch.Tensor]:
    """Query, key and value of two images, 2 channels a head."""
    shapes = (2, 2 * heads, *(queries or size)), *[(2, 2 * kv_heads, *size)] * 2
    return [normal(*shape, seed=seed, device=device).requires_grad_() for seed, shape in enumerate(shapes)]


def assert_alike(ours, theirs, leaves) -> None:
    """Two pairs (out, lse), and the gradients of the same loss of both."""
    found = []
    for out, lse in (ours, theirs):
        lse = lse.where(lse.isfinite(), 0)
        loss = (out * normal(*out.shape, seed=7, device=out.device)).sum() + lse.sin().sum()
        found.append((out, lse, *torch.autograd.grad(loss, leaves, retain_graph=True)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def attend(target, maps, kernel, **options):
    return local_attention(*maps, kernel, heads=4, return_lse=True, backend=target.backend, **options)


def full_attention(maps, bias=None):
    """Output and log-sum-exp over all keys, of logits written out."""
    q, k, v = (x.unflatten(1, (4, -1)).flatten(3) for x in maps)
    logits = torch.einsum("bhdq,bhdk->bhqk", q, k)
    logits = logits if bias is None else logits + bias
    size = maps[0].shape[2:]
    out = torch.einsum("bhqk,bhdk->bhdq", logits.softmax(-1), v)
    return out.flatten(1, 2).unflatten(2, size), logits.logsumexp(-1).unflatten(2, size)


@in_general
@pytest.mark.parametrize("border", ["shift", "circular", ("shift", "circular")], ids=str)
@pytest.mark.parametrize("size", [(8, 9), (7, 6)], ids=str)
def test_a_window_as_large_as_the_map_is_full_attention(target, border, size):
    maps = three_maps(target.device, size)
    assert_alike(attend(target, maps, size, border=border), full_attention(maps), maps)


@in_general
def test_bias_by_displacement_is_a_bias_by_relative_position(target):
    maps, (h, w) = three_maps(target.device, (4, 5)), (4, 5)
    bias = normal(4, 2 * h - 1, 2 * w - 1, device=target.device).requires_grad_()
    ys, xs = (torch.arange(n, device=target.device) for n in (h, w))
    down, right = ys - ys[:, None] + h - 1, xs - xs[:, None] + w - 1  # [query, key]
    of_pair = bias[:, down[:, None, :, None], right[None, :, None, :]].flatten(3).flatten(1, 2)
    got = attend(target, maps, (h, w), border="shift", bias=bias)
    assert_alike(got, full_attention(maps, of_pair), [*maps, bias])


@in_general
@pytest.mark.parametrize("dilation", [1, (2, 3)], ids=str)
def test_circular_windows_roll_with_the_map(target, dilation):
    maps = three_maps(target.device)
    there = normal(2, 8, 9, seed=5, device=target.device) > -0.5

    def roll(x, sign=1):
        return x.roll((3 * sign, -2 * sign), (-2, -1))

    options = {"border": "circular", "dilation": dilation}
    rolled = attend(target, [roll(x) for x in maps], (4, 3), **options, key_mask=roll(there))
    wanted = attend(target, maps, (4, 3), **options, key_mask=there)
    assert_alike([roll(x, -1) for x in rolled], wanted, maps)


@in_general
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize(("kernel", "dilation"), [((4, 5), 1), ((2, 3), (3, 2))], ids=str)
def test_maps_go_on_as_torch_pads_them(target, mode, kernel, dilation):
    """Attention in the middle of a padded map."""
    maps, margin = three_maps(target.device), 4
    padded = [F.pad(x, (margin,) * 4, mode=mode) for x in maps]
    wanted = attend(target, padded, kernel, border="mask", dilation=dilation)
    middle = slice(margin, -margin)
    assert_alike(
        attend(target, maps, kernel, border=mode, dilation=dilation),
        [x[..., middle, middle] for x in wanted],
        maps,
    )


@in_general
@pytest.mark.parametrize(
    ("border", "size", "causal"),
    [
        ("zeros", (7, 6), False),
        ("mask", (5, 7), True),
        ("mask", (5, 7), (False, True)),
        ("shift", (8, 7), False),
        ("shift", (8, 7), (True, False)),
        ("circular", (6, 8), False),  # of sizes that the dilation divides, each class goes on as itself
    ],
    ids=str,
)
def test_dilation_is_attention_within_residue_classes(target, border, size, causal):
    maps, step = three_maps(target.device, size), (3, 2)
    options = {"border": border, "causal": causal, "bias": normal(4, 2, 3, device=target.device)}
    whole = attend(target, maps, (2, 3), dilation=step, **options)
    together = [torch.zeros_like(x) for x in whole]
    for i, j in itertools.product(*map(range, step)):
        part = attend(target, [x[..., i :: step[0], j :: step[1]] for x in maps], (2, 3), **options)
        for x, piece in zip(together, part, strict=True):
            x[..., i :: step[0], j :: step[1]] = piece
    assert_alike(whole, together, maps)


@in_general
@options
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_shared_key_heads_are_repeated_ones(target, kv_heads, options):
    query, *pair = maps = three_maps(target.device, kv_heads=kv_heads)
    repeated = [x.unflatten(1, (kv_heads, 2)).repeat_interleave(4 // kv_heads, 1).flatten(1, 2) for x in pair]
    got = attend(target, maps, (3, 4), kv_heads=kv_heads, **options)
    assert_alike(got, attend(target, (query, *repeated), (3, 4), **options), maps)
    geometry = {"heads": 4, "backend": target.backend} | options
    logits = local_similarity(*maps[:2], (3, 4), kv_heads=kv_heads, **geometry)
    torch.testing.assert_close(logits, local_similarity(query, repeated[0], (3, 4), **geometry))
    weight = logits.softmax(-1)
    out = local_aggregate(weight, maps[2], (3, 4), kv_heads=kv_heads, **geometry)
    torch.testing.assert_close(out, local_aggregate(weight, repeated[1], (3, 4), **geometry))


@in_general
@options
def test_finer_queries_see_the_window_of_the_key_they_lie_in(target, options):
    maps = three_maps(target.device, queries=(16, 27))
    whole = attend(target, maps, (3, 4), **options)
    together = [torch.zeros_like(x) for x in whole]
    for i, j in itertools.product(range(2), range(3)):
        part = attend(target, (maps[0][..., i::2, j::3], *maps[1:]), (3, 4), **options)
        for x, piece in zip(together, part, strict=True):
            x[..., i::2, j::3] = piece
    assert_alike(whole, together, maps)


@in_general
@options
def test_coarser_queries_see_the_window_of_the_key_under_their_middle(target, options):
    maps = three_maps(target.device, size=(8, 9), queries=(4, 3))
    fine = maps[0].new_zeros(2, 8, 8, 9)
    fine[..., 1::2, 1::3] = maps[0]
    wanted = [x[..., 1::2, 1::3] for x in attend(target, (fine, *maps[1:]), (3, 4), **options)]
    assert_alike(attend(target, maps, (3, 4), **options), wanted, maps)


@in_general
@pytest.mark.parametrize("border", ["zeros", "mask"])
@pytest.mark.parametrize("causal", ["raster", True, (True, False), (False, True)], ids=str)
def test_causal_windows_see_nothing_later(target, border, causal):
    """The gradient of a pixel is where its window is, and nowhere later."""
    maps, (y, x), kernel = three_maps(target.device, (6, 7)), (3, 4), (3, 4)
    out, _ = attend(target, maps, kernel, border=border, causal=causal)
    ends = {True: (True, True), "raster": (False, False)}.get(causal, causal)
    top, left = (q - (k - 1 if end else k // 2) for q, k, end in zip((y, x), kernel, ends, strict=True))
    window = torch.zeros(6, 7, dtype=torch.bool, device=target.device)
    window[top : top + kernel[0], left : left + kernel[1]] = True
    if causal == "raster":
        window.view(-1)[y * 7 + x + 1 :] = False
    for grad in torch.autograd.grad(out[1, :, y, x].sum(), maps[1:]):
        assert not grad[0].any()
        assert torch.equal(grad[1].ne(0).all(0), window)
        assert torch.equal(grad[1].ne(0).any(0), window)


@in_general
@options
def test_a_mask_that_hides_nothing_and_a_bias_of_zeros_change_nothing(target, options):
    maps = three_maps(target.device)
    wanted = attend(target, maps, (3, 4), **options)
    there = torch.ones(2, 8, 9, dtype=torch.bool, device=target.device)
    assert_alike(attend(target, maps, (3, 4), key_mask=there, **options), wanted, maps)
    shapes = [(4, 12), (4, 3, 4)] + [(4, 5, 7)] * ("shift" in options["border"])
    for shape in shapes:
        bias = maps[0].new_zeros(shape)
        assert_alike(attend(target, maps, (3, 4), bias=bias, **options), wanted, maps)
        out, lse = attend(target, maps, (3, 4), bias=bias + 3.0, **options)
        assert_alike((out, lse - 3.0), wanted, maps)


@in_general
@options
def test_what_a_mask_hides_is_not_read(target, options):
    """Hidden keys and values may be anything finite; they get no gradient."""
    maps = three_maps(target.device)
    there = normal(2, 8, 9, seed=4, device=target.device) > 0
    got = attend(target, maps, (3, 4), key_mask=there, **options)
    changed = [maps[0], *(torch.where(there[:, None], x, 1e3) for x in maps[1:])]
    assert_alike(got, attend(target, changed, (3, 4), key_mask=there, **options), maps)
    grads = torch.autograd.grad(got[0].square().sum(), maps[1:])
    assert all(not x.movedim(1, -1)[~there].any() for x in grads)


@in_general
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("border", ["mask", "shift", "circular", "replicate"])
@pytest.mark.parametrize("hidden", ["everything", "some"])
def test_a_query_that_sees_no_key_gives_nothing(target, dtype, border, hidden):
    maps = [x.detach().to(dtype).requires_grad_() for x in three_maps(target.device)]
    bias = normal(4, 3, 4, device=target.device).to(dtype).requires_grad_()
    there = torch.zeros(2, 8, 9, dtype=torch.bool, device=target.device)
    if hidden == "some":
        there[0, :, 6:] = there[1, 7:] = True
    given = {"border": border, "bias": bias, "key_mask": there}
    out, lse = attend(target, maps, (3, 4), **given)
    seen = local_similarity(*maps[:2], (3, 4), heads=4, backend=target.backend, **given).isfinite().any(-1)
    blind = ~seen[:, 0]  # [B, H, W]
    assert blind.all() if hidden == "everything" else blind.any() and not blind.all()
    assert torch.equal(lse.isneginf(), ~seen)
    assert not lse.isnan().any()
    assert out.isfinite().all()
    assert not out.movedim(1, -1)[blind].any()
    loss = out.float().square().sum() + lse.where(seen, 0).sum() + (lse * blind[:, None]).nansum()
    grads = torch.autograd.grad(loss, [*maps, bias])
    assert all(x.isfinite().all() for x in grads)
    assert not grads[0].movedim(1, -1)[blind].any()
    if hidden == "everything":
        assert not any(x.any() for x in grads)


@in_general
def test_general_windows_read_maps_where_they_lie(target):
    """Layouts with NaN between their numbers, of all maps, change nothing."""
    maps = [x.detach() for x in three_maps(target.device, queries=(5, 11), kv_heads=2)]
    there = normal(2, 9, 8, seed=4, device=target.device).transpose(1, 2) > -1
    given = {"kv_heads": 2, "border": ("circular", "mask"), "dilation": (1, 2), "key_mask": there}
    wanted = attend(target, maps, (3, 4), **given)
    for layout in ("channels_last", "sliced", "thinned", "transposed", "chunk", "padded"):
        got = attend(target, [lay_out(x, layout) for x in maps], (3, 4), **given)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)


@in_general
@pytest.mark.parametrize("border", ["zeros", "shift", "reflect", "replicate", "circular", ("shift", "zeros")], ids=str)
@pytest.mark.parametrize("kernel", [(3, 5), (4, 2)], ids=str)
def test_away_from_the_border_all_borders_are_alike(target, border, kernel):
    maps = three_maps(target.device)
    inner = slice(2, -2)
    ours, theirs = (
        [x[..., inner, inner] for x in attend(target, maps, kernel, border=name)] for name in (border, "mask")
    )
    assert_alike(ours, theirs, maps)


@in_general
def test_zeros_around_the_map_are_never_masked(target):
    maps = three_maps(target.device)
    nothing = torch.zeros(2, 8, 9, dtype=torch.bool, device=target.device)
    out, lse = attend(target, maps, 3, key_mask=nothing)
    columns = torch.tensor([3.0] + 7 * [0.0] + [3.0], dtype=torch.float64, device=target.device)
    rows = torch.tensor([3.0] + 6 * [0.0] + [3.0], dtype=torch.float64, device=target.device)
    count = rows[:, None] + columns - rows[:, None] * columns / 9  # a corner is in a row and in a column
    assert not out.any()
    torch.testing.assert_close(lse, count.log().expand_as(lse))


DILATED = (
    {"dilation": 2},
    {"dilation": (1, 3), "border": "mask", "causal": (False, True)},
    {"dilation": (2, 3), "border": ("zeros", "shift"), "key_mask": True},
    {"dilation": (1, 2), "border": "mask", "causal": "raster"},
    {"dilation": (1, 2), "bias": True},
)


@pytest.mark.parametrize("target", [t.param() for t in TARGETS if t.backend == "triton"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("options", DILATED, ids=str)
def test_rows_read_whole_and_taken_apart_give_the_same(target, whole, options, monkeypatch):
    """Where columns lie side by side; with a bias, and where channels do, rows are taken apart in any case."""
    launch = importlib.import_module("image_local_attention.kernels.launch")
    lattices, begin = set(), launch.Launch.__init__

    def watched(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        lattices.add(self.spans[1].lattice)

    monkeypatch.setattr(launch.Launch, "__init__", watched)
    monkeypatch.setattr(launch.plan, "undivided", lambda *_: whole)
    *maps, upstream = (normal(1, 3, 7, 16, seed=seed, device=target.device) for seed in range(4))
    asked = dict(options)
    if "bias" in options:
        asked["bias"] = normal(1, 15, device=target.device)
    if "key_mask" in options:
        asked["key_mask"] = normal(1, 7, 16, device=target.device) > -1

    def results(dtype, backend, memory_format):
        leaves = [x.to(dtype, memory_format=memory_format, copy=True).requires_grad_() for x in maps]
        given = asked | {"bias": asked["bias"].to(dtype)} if "bias" in asked else asked
        out = local_attention(*leaves, (3, 5), backend=backend, **given)
        return out, *torch.autograd.grad(out, leaves, upstream.to(dtype, memory_format=memory_format))

    exact = results(torch.float64, "reference", torch.contiguous_format)
    step = asked["dilation"] if isinstance(asked["dilation"], int) else asked["dilation"][1]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        lattices.clear()
        for got, want in zip(results(torch.float32, "triton", memory_format), exact, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
        apart = memory_format == torch.channels_last or "bias" in options or not whole
        assert lattices == {step if apart else 1}
