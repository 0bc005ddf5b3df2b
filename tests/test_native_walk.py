"""Native kernels whose blocks walk: what they are compiled to, and how maps are cut for them."""

import importlib
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from image_local_attention.kernels.native import nvrtc, walk
from image_local_attention.kernels.native.compiled import ARGUMENTS
from image_local_attention.kernels.native.walk import Walk, WalkPlan
from test_native import NVRTC, SHARED, needs_nvrtc

WAITING = "serialized"  # of products, in what compilers say


def compiled_for(kernel, slots=6, dtype=torch.bfloat16) -> Walk:
    return Walk("grad_key_value", WalkPlan(slots), dtype, kernel, (kernel[0] // 2, kernel[1] // 2), 132)


@needs_nvrtc
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("side", range(1, 22, 4))
def test_kernels_of_every_width_compile_and_do_not_wait_for_each_product(side, dtype, monkeypatch):
    """Compilers say where they make each product wait for the one before."""
    monkeypatch.setattr(nvrtc, "library", lambda: NVRTC)
    compiled = compiled_for((side, side), dtype=dtype)
    numbers = struct.calcsize(ARGUMENTS[compiled.task].numbers)
    agreement = (
        f'\nstatic_assert(ROOM == {compiled.shared}, "");'
        "\nconstexpr int MAPS = 4 * sizeof(TensorMap) + 2 * sizeof(StridedMap<Number>);"
        f'\nstatic_assert(__builtin_offsetof(Arguments, after_grad_query) + 4 == MAPS + {numbers}, "");'
    )
    cubin, log = nvrtc.build(compiled.source + agreement, ("--gpu-architecture=sm_90a", *compiled.options))
    assert importlib.import_module("benchmarks.native_plans").stack_of(cubin) <= 64
    assert WAITING not in log
    assert compiled.shared <= SHARED


@needs_nvrtc
def test_compilers_say_where_products_wait(monkeypatch):
    """With fewer registers than the widest kernel asks for."""
    monkeypatch.setattr(nvrtc, "library", lambda: NVRTC)
    compiled = compiled_for((21, 21))
    source = compiled.source.replace("more_registers<240>", "more_registers<200>")
    assert WAITING in nvrtc.build(source, ("--gpu-architecture=sm_90a", *compiled.options))[1]


@needs_nvrtc
def test_windows_too_tall_for_the_bands_that_are_held_do_not_compile(monkeypatch):
    """A group would wait for a band that comes only when it lets go of another."""
    monkeypatch.setattr(nvrtc, "library", lambda: NVRTC)
    for kernel, slots in ((33, 11), 6), ((29, 11), 5):
        compiled, taller = compiled_for(kernel, slots), compiled_for((kernel[0] + 1, 11), slots)
        assert nvrtc.build(compiled.source, ("--gpu-architecture=sm_90a", *compiled.options))[0]
        with pytest.raises(nvrtc.CompileError, match="a tile's last band"):
            nvrtc.build(taller.source, ("--gpu-architecture=sm_90a", *taller.options))


@given(st.integers(1, 400), st.integers(1, 3000), st.integers(1, 160))
def test_columns_are_cut_into_blocks_of_which_none_is_empty(rows, columns, multiprocessors):
    count = walk.parts(rows, columns, multiprocessors)
    most = -(-rows // count)
    assert (count - 1) * most < rows <= count * most


def test_blocks_share_the_multiprocessors_evenly():
    assert walk.parts(64, 64, 132) == 2
    assert walk.parts(16, 16 * 64, 132) == 1
    assert walk.parts(64, 132, 132) == 1
    assert compiled_for((21, 21)).grid(8, 2, 500, 333) == (2 * 42, walk.parts(63, 2 * 42 * 8, 132), 8)
