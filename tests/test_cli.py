"""The command line on real files: what goes in comes out, and what cannot is said in one line."""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms
from typer.testing import CliRunner

from image_local_attention.cli import pictures
from image_local_attention.cli.app import app
from image_local_attention.cli.denoise import _progress_bar

PHOTOGRAPH = Path(__file__).parent.parent / "examples" / "photograph.png"
QUICK = ("--sigma", "25", "--window", "5", "--patch", "3")


@pytest.fixture(scope="module")
def photograph():
    return Image.open(PHOTOGRAPH).convert("RGB").crop((150, 60, 214, 108))


@pytest.fixture
def noisy(photograph, tmp_path):
    """A file of a photograph with noise of standard deviation 25 of 255."""
    levels = np.asarray(photograph) + np.random.default_rng(0).normal(0, 25, (48, 64, 3))
    path = tmp_path / "noisy.png"
    Image.fromarray(levels.clip(0, 255).round().astype("u1")).save(path)
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, ["denoise", *map(str, arguments)])


def denoised(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def assert_one_line(result, *words):
    """Exit code 2 and one line on standard error, with these words; nothing else."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def in_mode(photograph, mode):
    """The photograph in a mode of Pillow, with all that the mode can hold."""
    if mode == "F":
        return Image.fromarray(np.asarray(photograph.convert("L"), dtype=np.float32) / 255)
    if mode in ("I", "I;16"):
        levels = np.asarray(photograph, dtype=np.int32) @ np.array([70, 119, 67])
        return Image.fromarray(levels.astype("u2" if mode == "I;16" else "i4"))
    picture = photograph.convert(mode)
    if mode in ("LA", "RGBA"):
        alpha = np.random.default_rng(0).integers(0, 256, (48, 64), dtype="u1")
        picture.putalpha(Image.fromarray(alpha))
    return picture


def test_removes_noise(noisy, photograph, tmp_path):
    out = tmp_path / "out.png"
    result = denoised(noisy, out)
    assert result.stderr == ""
    assert "64x48 RGB, noise 2" in result.stdout
    assert "(estimated)" in result.stdout

    def error(path):
        return np.square(np.asarray(Image.open(path), dtype=float) - np.asarray(photograph)).mean()

    # Six decibels.
    assert error(out) < error(noisy) / 4


def test_options_reach_the_operator(noisy, tmp_path):
    outcomes = {}
    choices = ((), ("--strength", 2), ("--window", 9), ("--patch", 7), ("--patch-weights", "flat"), ("--sigma", 9))
    for choice in choices:
        out = tmp_path / "out.png"
        denoised(noisy, out, "--device", "cpu", *choice)
        outcomes[choice] = Image.open(out).tobytes()
    assert len(set(outcomes.values())) == len(choices)


PNG, TIFF = ("L", "LA", "RGB", "RGBA", "I;16"), ("RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F")


@pytest.mark.parametrize(
    ("mode", "suffix"), [*((m, ".png") for m in PNG), *((m, ".tif") for m in TIFF), ("RGB", ".bmp"), ("I", ".pgm")]
)
def test_modes_come_back(photograph, mode, suffix, tmp_path):
    source, same, out = (tmp_path / (name + suffix) for name in ("in", "same", "out"))
    in_mode(photograph, mode).save(source)
    denoised(source, same, "--sigma", 0)
    denoised(source, out, *QUICK, "--compare", tmp_path / "compare.png")
    with Image.open(source) as before, Image.open(same) as unchanged, Image.open(out) as after:
        assert unchanged.mode == after.mode == before.mode == mode
        np.testing.assert_array_equal(np.asarray(unchanged), np.asarray(before))
        assert not np.array_equal(np.asarray(after), np.asarray(before))
        if mode in ("LA", "RGBA"):
            assert after.getchannel("A").tobytes() == before.getchannel("A").tobytes()


def test_sixteen_bits_keep_their_depth(tmp_path):
    levels = np.linspace(20000, 21000, 64 * 48).reshape(48, 64)
    noise = np.random.default_rng(0).normal(0, 200, levels.shape)
    source, out, compare = (tmp_path / name for name in ("in.png", "out.png", "compare.png"))
    Image.fromarray((levels + noise).round().astype("u2")).save(source)
    denoised(source, out, "--compare", compare)
    with Image.open(out) as picture, Image.open(compare) as panels:
        after, shown = np.asarray(picture, dtype=float), np.asarray(panels, dtype=float)[22:, 72:136, 0]
    # One level of 8 bits is 257 here: the result could not come near through 8 bits.
    assert np.abs(after - levels).mean() < 60
    assert np.abs(shown - after / 257).max() <= 0.5


@pytest.mark.parametrize(("transparency", "mode"), [(None, "RGB"), (0, "RGBA")])
def test_palettes_become_colours(photograph, transparency, mode, tmp_path):
    palette = photograph.quantize(16)
    source, out = tmp_path / "in.png", tmp_path / "out.png"
    palette.save(source, transparency=transparency)
    denoised(source, out, "--sigma", 0)
    with Image.open(source) as before, Image.open(out) as after:
        assert after.mode == mode
        assert after.tobytes() == before.convert(mode).tobytes()


def exif_turned():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "camera"
    return exif


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_metadata_is_kept(photograph, suffix, tmp_path):
    source, out, compare = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}", tmp_path / "compare.png"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photograph.save(source, icc_profile=profile, exif=exif_turned(), dpi=(300, 300))
    denoised(source, out, *QUICK, "--compare", compare)
    with Image.open(out) as after:
        assert after.size == photograph.size
        assert after.info["icc_profile"] == profile
        assert after.getexif()[ExifTags.Base.Orientation] == 6
        assert after.getexif()[ExifTags.Base.Make] == "camera"
        if suffix != ".webp":
            assert after.info["dpi"] == pytest.approx((300, 300), abs=0.02)
    with Image.open(compare) as panels:
        # Upright: turned by a quarter.
        assert panels.width == 3 * photograph.height + 2 * 8
    denoised(source, tmp_path / "no_place_for_metadata.bmp", *QUICK)


def test_compare_shows_before_after_and_difference(noisy, tmp_path):
    out, compare = tmp_path / "out.png", tmp_path / "compare.png"
    result = denoised(noisy, out, *QUICK, "--compare", compare)
    assert "noise 25.0 of 255 (given)" in result.stdout
    with Image.open(compare) as picture:
        panels = np.asarray(picture)[22:].astype(int)
    before, after, difference = panels[:, :64], panels[:, 72:136], panels[:, 144:]
    with Image.open(noisy) as given, Image.open(out) as written:
        np.testing.assert_array_equal(before, np.asarray(given))
        np.testing.assert_array_equal(after, np.asarray(written))
    # Three times 25 fill the half range of 128 at gain 2.
    np.testing.assert_array_equal(difference, (2 * (before - after) + 128).clip(0, 255))


def test_only_the_first_frame_is_read(photograph, tmp_path):
    source, out = tmp_path / "in.gif", tmp_path / "out.png"
    photograph.save(source, save_all=True, append_images=[photograph.rotate(180)])
    result = denoised(source, out, "--sigma", 0)
    assert result.stderr == f"note: {source}: has 2 frames, only the first is read\n"
    with Image.open(source) as before, Image.open(out) as after:
        assert after.tobytes() == before.convert("RGB").tobytes()


def png_of(width, height, pixels, depth=8):
    """A PNG of RGB written by hand: Pillow writes neither bombs nor 16 bits per channel."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_deep_colours_are_noted(tmp_path):
    source, out = tmp_path / "in.png", tmp_path / "out.png"
    source.write_bytes(png_of(4, 4, 4 * (b"\0" + 4 * b"\x40\0\x80\0\xc0\0"), depth=16))
    result = denoised(source, out, "--sigma", 0)
    assert result.stderr == f"note: {source}: has 16 bits per channel, Pillow reads 8 of them\n"


def truncated(path, photograph, **options):
    photograph.save(path, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_input(kind, path, photograph):
    if kind == "directory":
        path.mkdir()
    elif kind in ("text", "empty"):
        path.write_text("no picture" if kind == "text" else "")
    elif kind == "bomb":
        path.write_bytes(png_of(60000, 60000, b""))
    elif kind == "bits":
        photograph.convert("1").save(path, format="PNG")
    elif kind == "floats":
        Image.fromarray(np.full((4, 4), 7.5, dtype=np.float32)).save(path, format="TIFF")
    elif kind == "not a number":
        Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)).save(path, format="TIFF")
    elif kind.startswith("truncated"):
        truncated(path, photograph, format=kind.split()[1])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no such file"),
        ("directory", "is a directory"),
        ("text", "not a picture"),
        ("empty", "not a picture"),
        ("bomb", "too large"),
        ("bits", "mode 1 is not supported"),
        ("floats", "must lie in 0..1, got 7.5..7.5"),
        ("not a number", "must lie in 0..1, got nan..nan"),
        ("truncated PNG", "damaged or truncated"),
        ("truncated JPEG", "damaged or truncated"),
        ("truncated TIFF", "damaged or truncated"),
        ("truncated WEBP", "damaged or truncated"),
        ("truncated GIF", "damaged or truncated"),
    ],
)
def test_bad_input_is_told_in_one_line(kind, words, photograph, tmp_path):
    source, out = tmp_path / "in [red].png", tmp_path / "out.png"
    make_input(kind, source, photograph)
    assert_one_line(invoke(source, out), f"{source}: ", words)
    assert not out.exists()


def test_a_strange_name_is_still_one_line(tmp_path):
    assert_one_line(invoke(tmp_path / "two\nlines.png", tmp_path / "out.png"), "two lines.png: no such file")


def test_pictures_up_to_the_hard_limit_are_read(noisy, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 * 2 // 3)
    assert denoised(noisy, tmp_path / "out.png", *QUICK).stderr == ""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 3)
    assert_one_line(invoke(noisy, tmp_path / "out.png"), "too large")


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("missing/out.png", "there is no directory"),
        ("noisy.png/out.png", "there is no directory"),
        (".", "is a directory"),
        ("/dev/null", "not a regular file"),
        ("out", "no format of suffix ''"),
        ("out.picture", "no format of suffix '.picture'"),
        ("out.psd", "no format of suffix '.psd'"),
    ],
)
@pytest.mark.parametrize("option", ["OUT", "--compare"])
def test_bad_output_is_told_before_any_work(noisy, tmp_path, monkeypatch, out, words, option):
    monkeypatch.setattr("image_local_attention.nlm.non_local_means", None)
    targets = [tmp_path / out] if option == "OUT" else [tmp_path / "out.png", "--compare", tmp_path / out]
    assert_one_line(invoke(noisy, *targets), words)
    assert os.listdir(tmp_path) == ["noisy.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_told(noisy, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert_one_line(invoke(noisy, closed / "out.png"), "cannot write into")


@pytest.mark.parametrize(("mode", "suffix"), [("RGBA", ".jpg"), ("I;16", ".jpg"), ("CMYK", ".png")])
def test_formats_that_cannot_hold_the_mode_are_told(photograph, mode, suffix, tmp_path):
    source, out = tmp_path / "in.tif", tmp_path / f"out{suffix}"
    in_mode(photograph, mode).save(source)
    assert_one_line(invoke(source, out), f"cannot write mode {mode}")
    assert os.listdir(tmp_path) == ["in.tif"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--window", "20"), "window must be odd and at least 1, got 20"),
        (("--patch", "0"), "patch must be odd and at least 1, got 0"),
        (("--strength", "inf"), "strength must be a finite number"),
        (("--device", "abacus"), "--device abacus cannot be used"),
        (("--device", "meta"), "--device meta cannot be used"),
    ],
)
def test_bad_options_are_told_in_one_line(noisy, tmp_path, options, words):
    assert_one_line(invoke(noisy, tmp_path / "out.png", *options), words)


@pytest.mark.parametrize("options", [("--sigma", "-1"), ("--sigma", "much"), ("--patch-weights", "box"), ("--what",)])
def test_wrong_usage_exits_with_two(noisy, tmp_path, options):
    result = invoke(noisy, tmp_path / "out.png", *options)
    assert result.exit_code == 2
    assert options[0] in result.stderr


def test_in_may_be_out(noisy, tmp_path):
    denoised(noisy, tmp_path / "out.png", *QUICK)
    link = tmp_path / "link.png"
    link.symlink_to(noisy)
    noisy.chmod(0o640)
    denoised(noisy, link, *QUICK)
    assert link.is_symlink()
    assert noisy.stat().st_mode & 0o777 == 0o640
    assert noisy.read_bytes() == (tmp_path / "out.png").read_bytes()


def test_compare_never_overwrites_a_picture(noisy, tmp_path):
    for compare in (noisy, tmp_path / "out.png"):
        assert_one_line(invoke(noisy, tmp_path / "out.png", "--compare", compare), "must be another file")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("bug")])
@pytest.mark.parametrize("moment", ["half written", "renaming"])
def test_a_failure_leaves_nothing_half_written(noisy, tmp_path, monkeypatch, failure, moment):
    out = tmp_path / "out.png"
    out.write_bytes(b"what was there before")

    def fail(*arguments, **options):
        raise failure

    def half_save(image, file, *arguments, **options):
        if isinstance(file, pictures.BytesIO):
            return
        file.write(b"half")
        fail()

    if moment == "renaming":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(Image.Image, "save", half_save)
    result = invoke(noisy, out, *QUICK)
    assert result.exit_code != 0
    assert out.read_bytes() == b"what was there before"
    assert sorted(os.listdir(tmp_path)) == ["noisy.png", "out.png"]
    if isinstance(failure, OSError):
        assert_one_line(result, f"{out}: cannot be written", "No space left on device")


def test_progress_appears_on_long_work_only(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with _progress_bar() as progress:
        progress(10, 10)
    assert "denoising" not in capsys.readouterr().err
    with _progress_bar() as progress:
        progress(4, 10)
        progress(10, 10)
    assert "denoising" in capsys.readouterr().err


def test_info_names_what_is_installed():
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    for word in ("image-local-attention", "torch", "triton", "cpu"):
        assert word in result.stdout


def python(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=100)


def test_the_program_itself(noisy, tmp_path):
    out = tmp_path / "out.png"
    done = python("-m", "image_local_attention.cli", "denoise", noisy, out, *QUICK)
    assert (done.returncode, done.stderr) == (0, "")
    assert Image.open(out).size == (64, 48)
    refused = python("-m", "image_local_attention.cli", "denoise", tmp_path / "nothing.png", out)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"error: {tmp_path / 'nothing.png'}: no such file\n"


def test_without_the_extra_one_line_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from image_local_attention.cli import main; main()"
    done = python("-c", code)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install 'image-local-attention[cli]'" in done.stderr
