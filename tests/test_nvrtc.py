"""Compiling CUDA C++ at run time: what NVRTC makes and says, and what is kept on disk."""

import pytest
import torch

from image_local_attention.kernels.native import launch, nvrtc
from test_native import NVRTC, needs_nvrtc

EMPTY = 'extern "C" __global__ void nothing() {}'
OPTIONS = ("--gpu-architecture=sm_90",)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Counts what is compiled; results are kept in the folder that it gives."""
    build, count = nvrtc.build, []
    monkeypatch.setattr(nvrtc, "library", lambda: NVRTC)
    monkeypatch.setattr(nvrtc, "build", lambda *args: count.append(args) or build(*args))
    monkeypatch.setenv("IMAGE_LOCAL_ATTENTION_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept", count


@needs_nvrtc
def test_what_was_compiled_is_kept(compiler):
    folder, count = compiler
    first = nvrtc.compiled(EMPTY, OPTIONS)
    assert first.startswith(b"\x7fELF")
    assert nvrtc.compiled(EMPTY, OPTIONS) == first
    assert len(count) == 1
    assert len(list(folder.iterdir())) == 1
    nvrtc.compiled(EMPTY + "\n", OPTIONS)
    nvrtc.compiled(EMPTY, ("--gpu-architecture=sm_100",))
    assert len(count) == 3


@needs_nvrtc
def test_nothing_is_kept_where_that_is_off_or_cannot_be(compiler, monkeypatch):
    folder, count = compiler
    monkeypatch.setenv("IMAGE_LOCAL_ATTENTION_CACHE", "off")
    nvrtc.compiled(EMPTY, OPTIONS)
    assert not folder.exists()
    folder.write_text("not a folder")
    monkeypatch.setenv("IMAGE_LOCAL_ATTENTION_CACHE", str(folder))
    nvrtc.compiled(EMPTY, OPTIONS)
    assert len(count) == 2


@needs_nvrtc
def test_a_source_that_does_not_compile_tells_why(compiler):
    with pytest.raises(nvrtc.CompileError, match="undefined"):
        nvrtc.compiled('extern "C" __global__ void wrong() { undefined; }', OPTIONS)


@needs_nvrtc
@pytest.mark.parametrize("content", [b"", b"cut"])
def test_a_file_that_is_no_machine_code_is_replaced(compiler, content):
    folder, count = compiler
    first = nvrtc.compiled(EMPTY, OPTIONS)
    (file,) = folder.iterdir()
    file.write_bytes(content)
    assert nvrtc.compiled(EMPTY, OPTIONS) == first == file.read_bytes()
    assert len(count) == 2


@needs_nvrtc
def test_a_file_that_cannot_be_read_is_compiled_anew(compiler):
    folder, count = compiler
    first = nvrtc.compiled(EMPTY, OPTIONS)
    (file,) = folder.iterdir()
    file.unlink()
    file.mkdir()
    assert nvrtc.compiled(EMPTY, OPTIONS) == first
    assert len(count) == 2


@needs_nvrtc
def test_a_gpu_that_nvrtc_does_not_know_is_left_to_triton(monkeypatch):
    monkeypatch.setattr(nvrtc, "library", lambda: NVRTC)
    assert {90, 100, 120} <= nvrtc.architectures()
    for arch, there in ((90, True), (999, False), (80, False)):
        monkeypatch.setattr(launch.gpus, "of", lambda device, arch=arch: launch.gpus.Gpu(arch, True))
        assert launch._available(torch.device("cuda", 0)) == there
