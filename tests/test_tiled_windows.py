"""The tiled backend against the reference, module against module: every window, every function, every gradient.

Problems are drawn from a seed. Maps are small, so plans are drawn too: tiles, products and parts of every size.
"""

import itertools
import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import image_local_attention.tiled as tiled
from image_local_attention import reference
from image_local_attention.maps import merge_heads, split_heads
from image_local_attention.rules import Rules
from image_local_attention.tiled import plan as plans
from image_local_attention.tiled.gathered import layers, where
from image_local_attention.window import BORDERS, OUTSIDE, Axis, Window
from test_memory import Allocations

SEEDS, PER_TEST = 160, 20
TOLERANCE = 1e-10  # of the largest value
NAN, NO_KEY = float("nan"), float("-inf")
ENDING = ("zeros", "mask", "shift")  # borders that a causal axis may have


class Problem(NamedTuple):
    """Maps as heads [B, heads, H, W, D], in fp64."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    grad_lse: Tensor | None
    rules: Rules

    @property
    def kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.key.shape[2:4])

    def to(self, dtype: torch.dtype) -> "Problem":
        *maps, rules = (x.to(dtype) if isinstance(x, Tensor) else x for x in self)
        return Problem(*maps, rules._replace(bias=None if rules.bias is None else rules.bias.to(dtype)))

    def attend(self, backend) -> tuple[Tensor | None, ...]:
        """Output, log-sum-exp and the gradients of query, key, value and bias."""
        out, lse = backend.attention(self.query, self.key, self.value, self.rules)
        saved = self.query, self.key, self.value, out, lse
        wanted = True, True, True, self.rules.bias is not None
        return out, lse, *backend.attention_backward(self.grad, self.grad_lse, *saved, wanted, self.rules)


def legal(window: Window, size: tuple[int, int], queries: tuple[int, int]) -> bool:
    for axis in window.axes(size, queries):
        if axis.shifts and axis.kernel * axis.dilation > axis.size:
            return False
        if axis.border == "reflect" and max(axis.overhang) >= axis.size:
            return False
        if axis.border == "circular" and max(axis.overhang) > axis.size:
            return False
    return True


def draw_window(draw: random.Random) -> tuple[Window, tuple[int, int], tuple[int, int]]:
    """A window, the size of the keys and that of the queries."""
    while True:
        border = draw.choices(BORDERS, k=2) if draw.random() < 0.5 else draw.choices(BORDERS) * 2
        kernel = tuple(draw.randint(1, 5) for _ in "yx")
        dilation = (1, 1) if draw.random() < 0.3 else tuple(draw.choice((1, 1, 2, 3)) for _ in "yx")
        size = tuple(draw.randint(1, 13) for _ in "yx")
        queries = size if draw.random() < 0.5 else tuple(draw.randint(1, 15) for _ in "yx")
        causal, raster, chance = (False, False), False, draw.random()
        if chance < 0.25 and set(border) <= set(ENDING):
            causal = draw.random() < 0.5, draw.random() < 0.5
        elif chance < 0.45 and set(border) <= {"zeros", "mask"}:
            raster = True
        window = Window(kernel, tuple(border), dilation, causal, raster)
        if legal(window, size, queries):
            return window, size, queries


def draw_problem(seed: int) -> Problem:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    window, size, queries = draw_window(draw)
    batch, kv_heads = draw.randint(1, 3), draw.choice((1, 2))
    heads = kv_heads * draw.choice((1, 1, 2, 3))

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def heads_of(n: int, depth: int, size: tuple[int, int]) -> Tensor:
        """Of a map that is contiguous, channels_last, or a slice of a larger one."""
        height, width = size
        layout = draw.choice(("contiguous", "channels_last", "sliced"))
        if layout == "sliced":
            return split_heads(numbers(batch, n * depth + 1, height + 2, 2 * width)[:, 1:, 1:-1, ::2], n)
        x = numbers(batch, n * depth, height, width)
        return split_heads(x.to(memory_format=torch.channels_last) if layout == "channels_last" else x, n)

    shape = draw.choice((None, (window.slots,), tuple(2 * k - 1 for k in window.kernel)))
    bias = None if shape is None else numbers(*shape, heads).movedim(-1, 0)
    share = draw.choice((None, None, 0.7, 0.1))
    key_mask = None if share is None else torch.rand((batch, *size), generator=generator) < share
    return Problem(
        heads_of(heads, 3, queries),
        heads_of(kv_heads, 3, size),
        heads_of(kv_heads, 2, size),
        heads_of(heads, 2, queries),
        numbers(batch, heads, *queries) if draw.random() < 0.7 else None,
        Rules(window, draw.choice((0.7, 1.0)), bias, key_mask),
    )


@pytest.fixture
def any_plan():
    """After `any_plan(seed)`, plans are drawn; one seed in four leaves them as they would be chosen."""
    patch = pytest.MonkeyPatch()  # not the one of `poison`

    def seeded(seed: int) -> None:
        draw = random.Random(seed)
        plans._cut.cache_clear()
        patch.undo()
        if draw.random() < 0.75:
            patch.setattr(plans, "SIDES", draw.choice(((1,), (1, 2), (1, 2, 4), plans.SIDES)))
            scores = draw.choice((50, 1000, 20_000, plans.MOST_SCORES))
            patch.setattr(plans, "scores_in_cache", lambda threads: scores)
            patch.setattr(plans, "_cost", lambda plan, work: draw.random() - (plan.x.side > 1) / 2)

    yield seeded
    patch.undo()
    plans._cut.cache_clear()


@pytest.mark.parametrize(
    ("told", "threads", "scores"),
    [("512K", 2, 2**18), ("2048K", 1, 2**19), ("2048K", 8, plans.MOST_SCORES), ("", 1, 2**17), (None, 2, 2**18)],
)
def test_products_are_as_large_as_the_caches(told, threads, scores, tmp_path, monkeypatch):
    file = tmp_path / "size"
    if told is not None:
        file.write_text(f"{told}\n")
    monkeypatch.setattr(plans, "Path", lambda path: file)
    assert plans.scores_in_cache.__wrapped__(threads) == scores


def assert_same(name: str, got: Tensor | None, wanted: Tensor | None) -> None:
    if wanted is None:
        assert got is None, name
        return
    assert (got.shape, got.dtype, got.stride()) == (wanted.shape, wanted.dtype, wanted.stride()), name
    finite = wanted.isfinite()
    assert torch.equal(got[~finite], wanted[~finite]), name
    if finite.any():
        largest = max(1.0, wanted[finite].abs().max().item())
        error = (got - wanted)[finite].abs().max().item()
        assert error <= TOLERANCE * largest, f"{name}: {error}"


def weights_there(problem: Problem, absent_too: bool) -> Tensor:
    """[B, heads, H, W, slots]: whether the key of a slot takes part, and unless `absent_too`, is in the map."""
    window, key_mask = problem.rules.window, problem.rules.key_mask
    if not absent_too:
        border = tuple("mask" if border == "zeros" else border for border in window.border)
        window, key_mask = Window(window.kernel, border, window.dilation, window.causal, window.raster), None
    return ~reference.similarity(problem.query, problem.key, Rules(window, 1.0, None, key_mask), NAN).isnan()


def seeds() -> list:
    return [pytest.param(range(i, i + PER_TEST), id=str(i)) for i in range(0, SEEDS, PER_TEST)]


@pytest.mark.parametrize("some", seeds())
def test_attention(some, any_plan, poison):
    for seed in some:
        any_plan(seed)
        problem = draw_problem(seed)
        names = "out", "lse", "dq", "dk", "dv", "dbias"
        for name, got, wanted in zip(names, problem.attend(tiled), problem.attend(reference), strict=True):
            assert_same(f"{name} of {seed}: {problem.rules.window}", got, wanted)


@pytest.mark.parametrize("some", seeds())
def test_unfused(some, any_plan, poison):
    """Weights and gradients of slots that no operator reads are NaN."""
    for seed in some:
        any_plan(seed)
        problem = draw_problem(seed)
        generator = torch.Generator().manual_seed(seed)
        query, key, value, grad, _, rules = problem
        shape = (*query.shape[:4], rules.window.slots)
        number = torch.randn(shape, generator=generator, dtype=torch.float64)
        weight = number.masked_fill(~weights_there(problem, absent_too=False), NAN)
        bias = (len(number[0]), rules.window.slots) if rules.bias is None else tuple(rules.bias.shape)
        number = number.masked_fill(~weights_there(problem, absent_too=True), NAN)
        calls = {
            "similarity": lambda backend: backend.similarity(query, key, rules, NO_KEY),  # noqa: B023
            "its gradient": lambda backend: backend.similarity(query, key, rules, 0.0),  # noqa: B023
            "aggregate": lambda backend: backend.aggregate(weight, value, rules),  # noqa: B023
            "transpose": lambda backend: backend.aggregate_transpose(
                weight, grad, problem.kv_heads, problem.size, rules  # noqa: B023
            ),
            "bias": lambda backend: backend.bias_gradient(number, rules, bias, problem.size),  # noqa: B023
        }  # fmt: skip
        for name, call in calls.items():
            assert_same(f"{name} of {seed}: {rules.window}", call(tiled), call(reference))


def worlds():
    """One of each kind of window that does not slide, on maps of several strips and tiles."""
    slots = torch.linspace(-1.0, 1.0, 4 * 25).view(4, 25)
    by_displacement = torch.linspace(-1.0, 1.0, 4 * 81).view(4, 9, 9)
    yield "dilation", Window((5, 5), dilation=(2, 3)), None, (40, 37), (40, 37)
    yield "shift", Window((5, 5), ("shift", "shift"), (1, 2)), by_displacement, (40, 37), (40, 37)
    yield "globe", Window((5, 5), ("reflect", "circular")), slots, (40, 37), (40, 37)
    yield "replicate", Window((5, 5), ("replicate", "replicate"), (3, 1)), None, (40, 37), (40, 37)
    yield "finer queries", Window((5, 5), ("mask", "mask")), slots, (20, 18), (40, 37)
    yield "raster", Window((5, 5), raster=True), slots, (40, 37), (40, 37)


WORLDS = [pytest.param(*world[1:], id=world[0]) for world in worlds()]


def large(window: Window, bias: Tensor | None, size, queries, depth: int = 8, dtype=torch.float32) -> Problem:
    """Two images, four heads, two of which share a head of the keys."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, depth, *queries), *[(2, 2, depth, *size)] * 2, (2, 4, depth, *queries)]
    maps = [torch.randn(shape, generator=generator).permute(0, 1, 3, 4, 2) for shape in shapes]
    key_mask = torch.rand((2, *size), generator=generator) < 0.9
    return Problem(*maps, torch.ones(2, 4, *queries), Rules(window, 0.3, bias, key_mask)).to(dtype)


@pytest.mark.parametrize(("window", "bias", "size", "queries"), WORLDS)
def test_many_tiles(window, bias, size, queries):
    problem = large(window, bias, size, queries, dtype=torch.float64)
    for got, wanted in zip(problem.attend(tiled), problem.attend(reference), strict=True):
        assert_same(str(window), got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("window", "bias", "size", "queries"), WORLDS)
def test_dtypes(window, bias, size, queries, dtype):
    """A few roundings of the largest value; one in dv of half precision, as all sums are in fp32."""
    problem = large(window, bias, size, queries, dtype=dtype)
    wanted = problem.to(torch.float64).attend(reference)
    names = "out", "lse", "dq", "dk", "dv", "dbias"
    for name, got, exact in zip(names, problem.attend(tiled), wanted, strict=True):
        if exact is None:
            continue
        roundings = 40 if dtype == torch.float32 else 0.51 if name == "dv" else 4
        finite = exact.isfinite()
        error = (got.double() - exact)[finite].abs().max() / exact[finite].abs().max()
        assert error <= roundings * torch.finfo(dtype).eps, name


@pytest.mark.parametrize(("window", "bias", "size", "queries"), WORLDS)
def test_the_same_bits_twice(window, bias, size, queries):
    problem = large(window, bias, size, queries)
    for once, again in zip(problem.attend(tiled), problem.attend(tiled), strict=True):
        assert (once is None and again is None) or torch.equal(once, again)


def test_a_query_without_keys_has_no_gradients(any_plan):
    """Whatever comes from upstream, and however large the bias."""
    window, size = Window((3, 3), ("mask", "circular"), (2, 1)), (9, 7)
    for seed, bias in itertools.product(range(6), (-1e4, 1e4)):
        any_plan(seed)
        problem = large(window, torch.full((4, 9), bias), size, size)
        nothing = torch.zeros(2, *size, dtype=torch.bool)
        problem = problem._replace(rules=problem.rules._replace(key_mask=nothing))
        out, lse, *grads = problem.attend(tiled)
        assert (lse == NO_KEY).all()
        assert not any(x.any() for x in (out, *grads))


@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_places_without_query_do_not_overflow(bias, any_plan):
    """Tiles reach over the queries: the logits there are nothing but bias."""
    for seed, window in itertools.product(range(6), (Window((3, 3)), Window((3, 3), ("shift", "shift"), (2, 1)))):
        any_plan(seed)
        problem = large(window, torch.full((4, 9), bias), (9, 7), (9, 7), dtype=torch.float64)
        for got, wanted in zip(problem.attend(tiled), problem.attend(reference), strict=True):
            assert_same(str(window), got, wanted)


def test_memory_is_strips():
    """144x144, 32 channels, four heads over one of the keys: no map, no repeated heads, no weights of a map."""
    side, heads, kernel, channels = 144, 4, 9, 32
    window = Window((kernel, kernel), ("shift", "shift"), (2, 2))
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n * channels, side, side) for n in (heads, 1, 1, heads)]
    counts = heads, 1, 1, heads
    maps = [split_heads(torch.randn(s, generator=generator), n) for s, n in zip(shapes, counts, strict=True)]
    bias = torch.zeros(heads, 2 * kernel - 1, 2 * kernel - 1)
    problem = Problem(*maps, None, Rules(window, 1.0, bias, None))
    problem.attend(tiled)  # plans and tables
    with Allocations() as count:
        results = problem.attend(tiled)
    largest = problem.key.nbytes
    assert count.at_least(largest) == sorted(x.nbytes for x in results if x is not None and x.nbytes >= largest)
    at_keys = (side + 2 * kernel) * (8 + kernel - 1) * channels * 4
    at_queries = heads * (side + 16) * 8 * channels * 4
    extra = count.peak - sum(x.nbytes for x in results)
    assert extra <= 4 * at_keys + 4 * at_queries + 5 * 2**21


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(("size", "queries"), [(13, None), (13, 26), (26, 13), (13, 9)])
def test_tiles_hold_every_key_once(border, size, queries):
    for kernel, dilation, side in itertools.product((1, 3, 4), (1, 2, 3), (1, 4, 8)):
        axis = Axis(kernel, size, border, dilation, queries=queries)
        tiles = plans.Tiles(axis, side)
        assert sorted(q for some in tiles.queries for q in some) == list(range(axis.query_count))
        for some, halo, pattern in zip(tiles.queries, tiles.keys, tiles.patterns, strict=True):
            assert len(halo) == tiles.length
            assert len(pattern.offsets) == len(pattern.displacements) == side
            assert max(pattern.offsets) + kernel <= tiles.length
            for query, offset, displacement in zip(some, *pattern, strict=False):
                keys = [axis.fold(axis.start(query) + dilation * i) for i in range(kernel)]
                assert list(halo[offset : offset + kernel]) == keys
                assert displacement == axis.displacement(query)
        outside = [[key == OUTSIDE for key in halo] for halo in tiles.keys]
        if not axis.sliding:
            for halo, (before, after) in zip(outside, tiles.outside, strict=True):
                assert sum(halo) == (before + after if not all(halo) else before)
                assert all(halo[:before] + halo[len(halo) - after :])


def test_what_is_selected():
    assert where([3], torch.device("cpu")) == slice(3, 4, 1)
    assert where([1, 3, 5], torch.device("cpu")) == slice(1, 6, 2)
    for numbers in ([3, 2, 1], [1, 2, 4], [0, 0]):
        assert where(numbers, torch.device("cpu")).tolist() == numbers
    for targets in ([0, 0, 0, 1, 2], [2, 1, 0, 1, 2], [1], []):
        found = layers(targets)
        assert sorted(place for places, _ in found for place in places) == list(range(len(targets)))
        for places, there in found:
            assert [targets[place] for place in places] == there
            assert len(set(there)) == len(there)


def test_results_lie_in_maps():
    x = torch.randn(1, 6, 8, 9).to(memory_format=torch.channels_last)
    q = split_heads(x, 2)
    rules = Rules(Window((3, 3), ("circular", "circular")))
    out, _ = tiled.attention(q, q, q, rules)
    assert merge_heads(out).is_contiguous(memory_format=torch.channels_last)
