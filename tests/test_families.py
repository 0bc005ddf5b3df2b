"""Thousands of random problems on a GPU: families that share their kernels, since kernels take longest to compile.

Of a family drawn at random, its relatives have other sizes, batches, scales, numbers and wanted gradients. Sizes grow
by multiples of 16, for Triton compiles anew where a size or a stride begins or ceases to be a multiple of it.
"""

import dataclasses
import functools
import itertools
import math
import os
import random

import pytest
import torch

from conftest import CUDA, Target
from problems import BORDERS, Problem, for_each, problems
from test_accuracy import AGGREGATE, ATTENTION, SIMILARITY, check

SEED = os.environ.get("ILA_FAMILIES_SEED", "")
FAMILIES = int(os.environ.get("ILA_FAMILIES", "400"))
RELATIVES = 26
WORK = 2**18  # numbers that plain code stores for the weighted values of a problem

OPERATORS = {"attention": ATTENTION, "similarity": SIMILARITY, "aggregate": AGGREGATE}
TURNS = ("attention", "attention", "similarity", "attention", "aggregate")  # the fused operator has most kernels
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
GPU = Target("triton", "cuda")


@functools.cache
def families() -> list[tuple[str, torch.dtype, Problem]]:
    """An operator, a dtype and a problem each; the same whenever they are drawn from one seed."""
    drawn: list[Problem] = []
    for_each(problems(work=WORK), FAMILIES * 5 // 4, f"families {SEED}", drawn.append)
    turns = itertools.cycle(itertools.product(TURNS, DTYPES))
    return [(name, dtype, problem) for (name, dtype), problem in zip(turns, dict.fromkeys(drawn), strict=False)][
        :FAMILIES
    ]


def relatives(problem: Problem, number: int, count: int = RELATIVES) -> list[Problem]:
    """The problem, and others that its kernels serve."""
    chance, found = random.Random(f"{SEED} {number}"), [problem]
    while len(found) < count:
        keys = problem.keys or problem.size
        grow = [16 * chance.randrange(2) for _ in range(2)]
        at_keys = grow if problem.keys is None else [16 * chance.randrange(2) for _ in range(2)]
        size, keys = grown(problem.size, grow), grown(keys, at_keys)
        other = dataclasses.replace(
            problem,
            size=size,
            keys=None if problem.keys is None else keys,
            batch=problem.batch if problem.batch == 1 else chance.randint(2, 4),
            scale=problem.scale and problem.scale * chance.choice((1.0, 0.5, 1.7)),
            spread=chance.choice((0.3, 1.0, 4.0)),
            magnitude=chance.choice((0.1, 1.0, 8.0)),
            wanted=(chance.random() < 0.8, *problem.wanted[1:3], chance.random() < 0.8),
            seed=chance.randrange(2**32),
        )
        depths = max(other.key_depth, other.value_depth)
        small = other.queries * other.slots * depths <= WORK
        met = [a == b for a, b in zip(size, keys, strict=True)]
        if small and met == [a == b for a, b in zip(problem.size, problem.keys or problem.size, strict=True)]:
            found.append(other)
        else:  # the size of the family always serves
            found.append(dataclasses.replace(other, size=problem.size, keys=problem.keys, batch=problem.batch))
    return found


def grown(size: tuple[int, int], by: list[int]) -> tuple[int, int]:
    """One pixel stays one: kernels are compiled for it."""
    return tuple(n if n == 1 else n + more for n, more in zip(size, by, strict=True))


@pytest.mark.families
@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("number", range(FAMILIES))
def test_a_family(number):
    name, dtype, family = families()[number]
    for problem in relatives(family, number):
        print(name, dtype, problem)  # the last one is what failed
        check(OPERATORS[name], problem, GPU, dtype)


def test_the_families_are_many_and_cover_every_option():
    drawn = [(name, dtype, each) for name, dtype, family in families() for each in relatives(family, 0, 2)[:1]]
    assert len(drawn) == FAMILIES
    assert FAMILIES < 400 or FAMILIES * RELATIVES >= 10_000
    for name in OPERATORS:
        some = [problem for operator, _, problem in drawn if operator == name]
        assert {p.border[axis] for p in some for axis in range(2)} == set(BORDERS)
        assert {str(p.causal) for p in some} >= {"False", "True", "raster", "(True, False)", "(False, True)"}
        assert {max(p.dilation) > 1 for p in some} == {p.keys is not None for p in some} == {True, False}
        assert {(p.kv_heads or p.heads) < p.heads for p in some} == {True, False}
        assert name == "aggregate" or {p.bias for p in some} == {"none", "slot", "patch", "displacement"}
        assert name == "aggregate" or {p.key_mask for p in some} == {"none", "most", "little", "nothing"}
        assert {dtype for operator, dtype, _ in drawn if operator == name} == set(DTYPES)


def test_relatives_differ_in_what_is_no_constant_of_a_kernel():
    seen = set()
    for number, (_, _, family) in enumerate(families()):
        some = relatives(family, number)
        assert len(set(some)) == len(some) == RELATIVES
        assert some == relatives(family, number)
        seen.update(some)
        for each in some:
            for ours, theirs in ((each.size, family.size), (each.keys or (0, 0), family.keys or (0, 0))):
                assert all((a - b) % 16 == 0 and (a == 1) == (b == 1) for a, b in zip(ours, theirs, strict=True))
            assert math.copysign(1, each.factor) == math.copysign(1, family.factor)
            assert (each.factor == 0) == (family.factor == 0)
    assert len(seen) == FAMILIES * RELATIVES


@pytest.mark.parametrize("number", range(3))
def test_relatives_are_problems(number):
    name, dtype, family = families()[number]
    for problem in relatives(family, number, 4):
        check(OPERATORS[name], problem, Target("tiled", "cpu"), dtype)
