"""The oracle and plain code, which judge everything else, against each other and against what others say."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import oracle
import plain

BORDERS = ("zeros", "mask", "shift", "reflect", "replicate", "circular")
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def problem(seed: int, largest: int = 7):
    """Query, key, value and bias or None, the kernel, and options of every kind; a seed has always the same."""
    rng = np.random.default_rng(seed)
    borders = [BORDERS[seed % 6], BORDERS[(seed if rng.random() < 0.5 else rng.integers(0, 6)) % 6]]
    ends = [bool(border in ("zeros", "mask", "shift") and rng.random() < 0.25) for border in borders]
    size = rng.integers(1, largest + 1, 2)
    queries = size if rng.random() < 0.6 else rng.integers(1, largest + 3, 2)
    kernel, dilation = rng.integers(1, 7, 2), rng.choice([1, 1, 2, 3], 2)
    for i, border in enumerate(borders):
        dilation[i] = min(dilation[i], size[i])
        if border == "shift" and not ends[i]:
            kernel[i] = min(kernel[i], size[i] // dilation[i])
        elif border in ("reflect", "circular"):
            overhang = size[i] - (border == "reflect")
            kernel[i] = min(kernel[i], 2 * (overhang // dilation[i]) + 1)
    kernel, dilation = tuple(kernel.tolist()), tuple(dilation.tolist())
    causal = rng.choice(["raster", "ends"], p=[0.3, 0.7]) if set(borders) <= {"zeros", "mask"} else "ends"
    causal = str(causal) if causal == "raster" else ends[0] if ends[0] == ends[1] else tuple(ends)

    batch, kv_heads, shared = rng.integers(1, 3, 3)
    heads, depths = int(kv_heads * shared), rng.integers(1, 4, 2)
    query = rng.standard_normal((batch, heads * depths[0], *queries))
    key, value = (rng.standard_normal((batch, kv_heads * depth, *size)) for depth in depths)
    kinds = [None, (kernel[0] * kernel[1],), kernel, (2 * kernel[0] - 1, 2 * kernel[1] - 1)]
    kind = kinds[rng.integers(0, 4 if "shift" in borders else 3)]
    bias = None if kind is None else rng.standard_normal((heads, *kind))
    key_mask = rng.random((batch, *size)) < rng.choice([0.2, 0.8]) if rng.random() < 0.5 else None
    geometry = {
        "heads": heads,
        "kv_heads": int(kv_heads) if shared > 1 else None,
        "border": borders[0] if borders[0] == borders[1] else tuple(borders),
        "dilation": dilation,
        "causal": causal,
    }
    return (query, key, value), bias, kernel, geometry, {"scale": float(rng.normal()), "key_mask": key_mask}


def randn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def index_map(size) -> np.ndarray:
    """[1, 1, H, W], every pixel its number."""
    return np.arange(size[0] * size[1], dtype=np.float64).reshape(1, 1, *size)


def differentiate(function, arrays, upstream):
    """Results of plain code and gradients of its arguments, None where an argument is."""
    leaves = [None if x is None else torch.from_numpy(x).requires_grad_() for x in arrays]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    inputs = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(
        results, inputs, [torch.from_numpy(g) for g in upstream], allow_unused=True, materialize_grads=True
    )
    grads = iter(grads)
    return [x.detach().numpy() for x in results], [None if x is None else next(grads).numpy() for x in leaves]


@pytest.mark.parametrize("seed", range(120))
def test_plain_code_and_the_oracle_agree(seed):
    (q, k, v), bias, kernel, geometry, more = problem(seed)
    seen_by_plain = more | {"key_mask": None if more["key_mask"] is None else torch.from_numpy(more["key_mask"])}
    logits = oracle.similarity(q, k, kernel, **geometry, **more, bias=bias)
    out, lse = oracle.attention(q, k, v, kernel, **geometry, **more, bias=bias)
    grad, grad_lse, grad_logits, weight = (randn(*x.shape, seed=seed) for x in (out, lse, logits, logits))
    # What takes no part, and a weight of a key outside the map, is not read.
    read, _ = oracle.aggregate_gradients(np.ones_like(out), weight, np.ones_like(v), kernel, **geometry)
    weight[read == 0] = grad_logits[np.isneginf(logits)] = np.nan

    def similarity(q, k, bias):
        return plain.similarity(q, k, kernel, **geometry, **seen_by_plain, bias=bias)

    def aggregate(weight, v):
        return plain.aggregate(weight, v, kernel, **geometry)

    def attention(q, k, v, bias):
        return plain.attention(q, k, v, kernel, **geometry, **seen_by_plain, bias=bias)

    options = {**geometry, **more, "bias": bias}
    pairs = [
        (
            differentiate(similarity, (q, k, bias), [grad_logits]),
            ([logits], oracle.similarity_gradients(grad_logits, q, k, kernel, **options)),
        ),
        (
            differentiate(aggregate, (weight, v), [grad]),
            (
                [oracle.aggregate(weight, v, kernel, **geometry)],
                oracle.aggregate_gradients(grad, weight, v, kernel, **geometry),
            ),
        ),
        (
            differentiate(attention, (q, k, v, bias), [grad, grad_lse]),
            ([out, lse], oracle.attention_gradients(grad, grad_lse, q, k, v, kernel, **options)),
        ),
    ]
    for (results, gradients), (exact, exact_gradients) in pairs:
        for got, wanted in zip([*results, *gradients], [*exact, *exact_gradients], strict=True):
            if wanted is None:
                assert got is None
            else:
                np.testing.assert_allclose(got, wanted, **EXACT)


@pytest.mark.parametrize("seed", range(200, 218))
def test_the_oracles_gradients_are_its_differences(seed):
    """Its adjoints against its own forward: central differences along random directions."""
    (q, k, v), bias, kernel, geometry, more = problem(seed, largest=4)
    options = geometry | more
    out, lse = oracle.attention(q, k, v, kernel, **options, bias=bias)
    slots = kernel[0] * kernel[1]
    grad, grad_lse = randn(*out.shape, seed=1), randn(*lse.shape, seed=2)
    weight, grad_weight = randn(*lse.shape, slots, seed=3), randn(*lse.shape, slots, seed=4)

    def attention(q, k, v, bias):
        out, lse = oracle.attention(q, k, v, kernel, **options, bias=bias)
        return (grad * out).sum() + (grad_lse * np.where(np.isfinite(lse), lse, 0)).sum()

    def similarity(q, k, bias):
        logits = oracle.similarity(q, k, kernel, **options, bias=bias)
        return (grad_weight * np.where(np.isfinite(logits), logits, 0)).sum()

    def aggregate(weight, v):
        return (grad * oracle.aggregate(weight, v, kernel, **geometry)).sum()

    of_attention = oracle.attention_gradients(grad, grad_lse, q, k, v, kernel, **options, bias=bias)
    of_similarity = oracle.similarity_gradients(grad_weight, q, k, kernel, **options, bias=bias)
    of_aggregate = oracle.aggregate_gradients(grad, weight, v, kernel, **geometry)
    rng = np.random.default_rng(seed)
    for loss, inputs, gradients in (
        (attention, (q, k, v, bias), of_attention),
        (similarity, (q, k, bias), of_similarity),
        (aggregate, (weight, v), of_aggregate),
    ):
        for i, gradient in enumerate(gradients):
            if inputs[i] is None:
                assert gradient is None
                continue
            step = 1e-5 * rng.standard_normal(inputs[i].shape)
            ahead, behind = ([*inputs[:i], inputs[i] + s, *inputs[i + 1 :]] for s in (step, -step))
            slope = (loss(*ahead) - loss(*behind)) / 2
            np.testing.assert_allclose((gradient * step).sum(), slope, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("border", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize(("kernel", "dilation"), [((3, 4), (1, 1)), ((5, 2), (1, 3)), ((1, 7), (2, 1))], ids=str)
def test_maps_go_on_as_torch_pads_them(border, kernel, dilation):
    size = (4, 5)
    left, right = ([d * (k // 2) for k, d in zip(kernel, dilation, strict=True)] for _ in range(2))
    padded = F.pad(torch.from_numpy(index_map(size)), (left[1], right[1], left[0], right[0]), mode=border)[0, 0]
    for y, x, seen in oracle.windows(size, kernel, border, dilation):
        rows, columns = (slice(i, i + d * (k - 1) + 1, d) for i, k, d in zip((y, x), kernel, dilation, strict=True))
        assert (seen.ys * size[1] + seen.xs).tolist() == padded[rows, columns].flatten().tolist()
        assert seen.slots.tolist() == list(range(kernel[0] * kernel[1]))
        assert seen.takes_part.all()


def test_windows_shift_as_nattens():
    """The start of a neighbourhood in NATTEN (odd kernels), as its sources had it."""

    def start(index, length, kernel, dilation):
        reach = kernel // 2 * dilation
        if index < reach:
            return index % dilation
        if index + reach < length:
            return index - reach
        residue, whole = index % dilation, length // dilation * dilation
        rest = length - whole
        return length - rest + residue - 2 * reach if residue < rest else whole + residue - kernel * dilation

    for size, kernel, dilation in itertools.product(range(1, 14), (1, 3, 5), (1, 2, 3)):
        if kernel * dilation <= size:
            for _, x, seen in oracle.windows((1, size), (1, kernel), ("mask", "shift"), (1, dilation)):
                first = start(x, size, kernel, dilation)
                assert seen.xs.tolist() == [first + dilation * i for i in range(kernel)]


@pytest.mark.parametrize(
    ("border", "size", "causal"),
    [
        ("zeros", (7, 6), False),
        ("zeros", (7, 6), (True, False)),
        ("mask", (5, 7), True),
        ("shift", (8, 7), False),
        ("shift", (8, 7), (False, True)),
        ("circular", (6, 8), False),  # of sizes that the dilation divides, each class goes on as itself
    ],
    ids=str,
)
def test_dilation_is_attention_within_residue_classes(border, size, causal):
    kernel, maps = (2, 3), [randn(2, 3, *size, seed=i) for i in range(3)]
    whole = oracle.attention(*maps, kernel, border=border, causal=causal, dilation=(3, 2))
    for i, j in itertools.product(range(3), range(2)):
        part = oracle.attention(*(x[..., i::3, j::2] for x in maps), kernel, border=border, causal=causal)
        for got, wanted in zip(whole, part, strict=True):
            np.testing.assert_allclose(got[..., i::3, j::2], wanted, **EXACT)


@pytest.mark.parametrize(("border", "kernel"), [("shift", (4, 5)), ("mask", (7, 9))], ids=str)
def test_a_window_as_large_as_the_map_is_full_attention(border, kernel):
    q, k, v = (randn(2, 6, 4, 5, seed=i) for i in range(3))
    out, _ = oracle.attention(q, k, v, kernel, heads=2, scale=0.7, border=border)
    heads = [torch.from_numpy(x).reshape(2, 2, 3, 20).transpose(2, 3) for x in (q, k, v)]
    full = F.scaled_dot_product_attention(*heads, scale=0.7).transpose(2, 3).reshape(2, 6, 4, 5)
    np.testing.assert_allclose(out, full.numpy(), **EXACT)


@pytest.mark.parametrize("queries", [(8, 10), (2, 5), (7, 3), (4, 13)], ids=str)
@pytest.mark.parametrize("border", ["zeros", "shift", "reflect"])
def test_queries_of_another_grid_read_the_nearest_key(queries, border):
    keys = index_map((4, 5))
    nearest = F.interpolate(torch.from_numpy(keys), size=queries, mode="nearest-exact")
    out = oracle.aggregate(np.ones((1, 1, *queries, 1)), keys, (1, 1), border=border)
    np.testing.assert_array_equal(out, nearest.numpy())


@pytest.mark.parametrize("border", ["zeros", "mask"])
def test_windows_that_end_at_the_query_are_halves_of_larger_ones(border):
    q, k, v = (randn(2, 3, 5, 6, seed=i) for i in range(3))
    for causal in (True, (True, False), (False, True)):
        ends = (causal, causal) if causal is True else causal
        large = tuple(2 * n - 1 if end else n for n, end in zip((3, 4), ends, strict=True))
        logits = oracle.similarity(q, k, large, border=border).reshape(2, 1, 5, 6, *large)[..., :3, :4]
        got = oracle.similarity(q, k, (3, 4), border=border, causal=causal)
        np.testing.assert_array_equal(got, logits.reshape(got.shape))
        weight = randn(*got.shape)
        filled = np.zeros((2, 1, 5, 6, *large))
        filled[..., :3, :4] = weight.reshape(2, 1, 5, 6, 3, 4)
        wanted = oracle.aggregate(filled.reshape(2, 1, 5, 6, -1), v, large, border=border)
        np.testing.assert_allclose(oracle.aggregate(weight, v, (3, 4), border=border, causal=causal), wanted, **EXACT)


@pytest.mark.parametrize("border", ["zeros", "mask"])
@pytest.mark.parametrize("kernel", [(3, 5), (4, 2), (1, 1)], ids=str)
def test_raster_drops_the_slots_after_the_query(border, kernel):
    q, k, v = (randn(2, 3, 5, 6, seed=i) for i in range(3))
    logits = oracle.similarity(q, k, kernel, border=border)
    logits[..., kernel[0] // 2 * kernel[1] + kernel[1] // 2 + 1 :] = -np.inf
    mass = np.exp(logits)
    out, lse = oracle.attention(q, k, v, kernel, border=border, causal="raster")
    np.testing.assert_array_equal(oracle.similarity(q, k, kernel, border=border, causal="raster"), logits)
    np.testing.assert_allclose(lse, np.log(mass.sum(-1)), **EXACT)
    wanted = oracle.aggregate(mass / mass.sum(-1, keepdims=True), v, kernel, border=border)
    np.testing.assert_allclose(out, wanted, **EXACT)


@pytest.mark.parametrize(("queries", "dilation"), [((5, 7), (1, 2)), ((10, 3), (1, 1))], ids=str)
def test_bias_by_displacement_follows_the_key(queries, dilation):
    size, kernel = (5, 7), (4, 3)
    table = randn(1, 7, 5)
    zero = np.zeros((1, 1, *size))
    bias = oracle.similarity(np.zeros((1, 1, *queries)), zero, kernel, border="shift", dilation=dilation, bias=table)
    for y, x, seen in oracle.windows(size, kernel, "shift", dilation, queries=queries):
        centre = [(2 * q + 1) * n // (2 * m) for q, n, m in zip((y, x), size, queries, strict=True)]
        down, right = (seen.ys - centre[0]) // dilation[0], (seen.xs - centre[1]) // dilation[1]
        assert bias[0, 0, y, x].tolist() == table[0, down + 3, right + 2].tolist()


def test_keys_outside_the_map_count_by_their_border():
    """How many of a corner's 3x3 keys take part, by the log-sum-exp of logits 0."""
    maps = [np.zeros((1, 1, 4, 5))] * 3
    counts = {
        "zeros": 9,
        "mask": 4,
        ("zeros", "mask"): 6,  # a row above the map counts where its column is in the map
        ("mask", "circular"): 6,
        ("zeros", "circular"): 9,
        ("shift", "mask"): 6,
    }
    for border, count in counts.items():
        _, lse = oracle.attention(*maps, (3, 3), border=border)
        np.testing.assert_allclose(lse[0, 0, 0, 0], np.log(count), **EXACT)
    _, lse = oracle.attention(*maps, (3, 3), border="shift", causal=True)
    np.testing.assert_allclose(lse[0, 0, 0, :3], np.log([1, 2, 3]), **EXACT)


def test_masked_keys_are_those_that_folding_reaches():
    q, k = randn(1, 2, 3, 4), randn(1, 2, 3, 4, seed=1)
    key_mask = randn(1, 3, 4, seed=2) > 0
    around = F.pad(torch.from_numpy(key_mask)[None].double(), (2, 2, 1, 1), mode="circular")
    there = around.unfold(2, 3, 1).unfold(3, 5, 1).flatten(4).numpy() > 0
    logits = oracle.similarity(q, k, (3, 5), border="circular", key_mask=key_mask)
    unmasked = oracle.similarity(q, k, (3, 5), border="circular")
    np.testing.assert_array_equal(logits, np.where(there, unmasked, -np.inf))


def test_masked_keys_leave_zeros_outside_the_map_alone():
    """Of a 3x3 map only the centre is there."""
    maps = [randn(1, 1, 3, 3, seed=i) for i in range(2)]
    key_mask = np.zeros((1, 3, 3), dtype=bool)
    key_mask[0, 1, 1] = True
    out, lse = oracle.attention(np.zeros((1, 1, 3, 3)), *maps, (3, 3), key_mask=key_mask)
    takes_part = np.array([[6, 4, 6], [4, 1, 4], [6, 4, 6]])
    np.testing.assert_allclose(lse[0, 0], np.log(takes_part), **EXACT)
    np.testing.assert_allclose(out[0, 0], maps[1][0, 0, 1, 1] / takes_part, **EXACT)


@pytest.mark.parametrize(
    ("border", "hidden_by"),
    [("mask", "mask"), ("shift", "mask"), ("circular", "mask"), ("zeros", "bias"), ("shift", "bias")],
)
def test_a_query_that_sees_no_key_gives_nothing(border, hidden_by):
    q, k, v, grad = (randn(2, 4, 3, 4, seed=i) for i in range(4))
    grad_lse = randn(2, 2, 3, 4)
    bias = np.full((2, 3, 3), -np.inf) if hidden_by == "bias" else randn(2, 3, 3)
    key_mask = np.full((2, 3, 4), hidden_by == "bias")
    options = {"heads": 2, "border": border}
    out, lse = oracle.attention(q, k, v, (3, 3), **options, bias=bias, key_mask=key_mask)
    grads = oracle.attention_gradients(grad, grad_lse, q, k, v, (3, 3), **options, bias=bias, key_mask=key_mask)

    def attention(*arrays):
        q, k, v, bias = arrays
        return plain.attention(q, k, v, (3, 3), **options, bias=bias, key_mask=torch.from_numpy(key_mask))

    (plain_out, plain_lse), plain_grads = differentiate(attention, (q, k, v, bias), [grad, grad_lse])
    for x in (out, *grads, plain_out, *plain_grads):
        np.testing.assert_array_equal(x, 0)
    for x in (lse, plain_lse):
        np.testing.assert_array_equal(x, -np.inf)


def test_query_heads_share_key_heads():
    q = randn(1, 8, 3, 4)
    k, v = (randn(1, 4, 3, 4, seed=i) for i in (1, 2))
    shared = oracle.attention(q, k, v, (3, 3), heads=4, kv_heads=2)
    for head in range(4):
        own, of = slice(2 * head, 2 * head + 2), slice(2 * (head // 2), 2 * (head // 2) + 2)
        out, lse = oracle.attention(q[:, own], k[:, of], v[:, of], (3, 3))
        np.testing.assert_allclose(shared[0][:, own], out, **EXACT)
        np.testing.assert_allclose(shared[1][:, head : head + 1], lse, **EXACT)
