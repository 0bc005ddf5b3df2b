"""Non-local means against its definition, against scikit-image, and against what it promises."""

import math
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.restoration import denoise_nl_means

from image_local_attention import nlm
from image_local_attention.nlm import estimate_sigma, non_local_means

PHOTOGRAPH = Path(__file__).parent.parent / "examples" / "photograph.png"
SKIMAGE_DATA = Path(skimage.__file__).parent / "data"


def load(path):
    levels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(levels).permute(2, 0, 1)[None]


def with_noise(image, sigma, seed=0):
    """What a camera would hand out: clipped to [0, 1]."""
    noise = np.random.default_rng(seed).normal(0.0, sigma, image.shape)
    return (image + torch.from_numpy(noise)).clamp(0.0, 1.0).to(image.dtype)


def psnr(a, b):
    return -10.0 * math.log10((a.double() - b.double()).square().mean())


def as_maps(image):
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]


def as_array(image):
    return image[0].permute(1, 2, 0).numpy()


def random_image(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def photograph():
    return load(PHOTOGRAPH)


@pytest.fixture(scope="module")
def crop(photograph):
    return photograph[..., 60:140, 130:230]


def by_definition(image, h, window, patch, patch_weights):
    """[H, W, C] fp64, one pixel pair after the other, nothing shared with the code under test."""
    height, width, channels = image.shape
    reach, search = patch // 2, window // 2
    weights = np.ones((patch, patch))
    if patch_weights == "gaussian" and patch > 1:
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        weights = np.exp(-(y**2 + x**2) / (2 * ((patch - 1) / 4) ** 2))
    weights = weights[..., None] / (weights.sum() * channels)
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    patches = np.lib.stride_tricks.sliding_window_view(padded, (patch, patch), axis=(0, 1))
    patches = patches.transpose(0, 1, 3, 4, 2)
    out = np.empty_like(image)
    for y in range(height):
        for x in range(width):
            total, norm = np.zeros(channels), 0.0
            for v in range(max(0, y - search), min(height, y + search + 1)):
                for u in range(max(0, x - search), min(width, x + search + 1)):
                    weight = np.exp(-(weights * (patches[y, x] - patches[v, u]) ** 2).sum() / h**2)
                    total += weight * image[v, u]
                    norm += weight
            out[y, x] = total / norm
    return out


@settings(max_examples=25)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.integers(1, 4),
    window=st.sampled_from([1, 3, 5, 21]),
    patch=st.sampled_from([1, 3, 5, 9]),
    patch_weights=st.sampled_from(["gaussian", "flat"]),
    h=st.sampled_from([0.05, 0.3, 2.0]),
    seed=st.integers(0, 99),
)
def test_is_the_definition(height, width, channels, window, patch, patch_weights, h, seed):
    image = np.random.default_rng(seed).random((height, width, channels))
    want = by_definition(image, h, window, patch, patch_weights)
    options = {"window": window, "patch": patch, "patch_weights": patch_weights}
    got = as_array(non_local_means(as_maps(image), sigma=h, **options))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)
    single = as_array(non_local_means(as_maps(image.astype(np.float32)), sigma=h, **options))
    np.testing.assert_allclose(single, want, rtol=0, atol=2e-4)


@pytest.mark.parametrize("patch", [3, 5, 7])
@pytest.mark.parametrize("colours", ["grey", "rgb"])
def test_is_scikit_images_exact_mode(crop, patch, colours):
    noisy = with_noise(crop.double(), 25 / 255)
    if colours == "grey":
        noisy = noisy.mean(1, keepdim=True)
    options = {"patch_size": patch, "patch_distance": 10, "fast_mode": False, "channel_axis": -1}

    def differences(h):
        want = denoise_nl_means(as_array(noisy).copy(), h=h, **options)
        got = as_array(non_local_means(noisy, sigma=h, patch=patch))
        return np.abs(got - want.reshape(got.shape))

    assert differences(25 / 255).mean() < 1.6e-3
    # Here no distance comes near the cut-off at 5 h^2; its exponential errs by up to 6 %.
    assert differences(0.2).mean() < 5e-4
    assert differences(0.2).max() < 1e-2


def test_gains_six_decibels_on_the_photograph(photograph):
    noisy = with_noise(photograph, 25 / 255)
    assert psnr(non_local_means(noisy), photograph) > psnr(noisy, photograph) + 6.0


@pytest.mark.parametrize("level", [10, 25, 50])
@pytest.mark.parametrize("name", ["chelsea.png", "astronaut.png", "coffee.png", "camera.png", "rocket.jpg"])
def test_estimates_the_noise_of_photographs(name, level):
    noisy = with_noise(load(SKIMAGE_DATA / name), level / 255)
    assert estimate_sigma(noisy) * 255 == pytest.approx(level, rel=0.15)


def test_estimate_takes_channels_together_and_samples_rows():
    sigmas = torch.tensor([0.02, 0.05, 0.1]).view(1, 3, 1, 1)
    ramp = torch.linspace(0.3, 0.7, 400)[:, None].expand(1, 3, 400, 300)
    noisy = ramp + sigmas * torch.randn(1, 3, 400, 300, generator=torch.Generator().manual_seed(0))
    want = sigmas.square().mean().sqrt().item()
    assert estimate_sigma(noisy) == pytest.approx(want, rel=0.03)
    assert estimate_sigma(noisy, max_pixels=30 * 300) == pytest.approx(want, rel=0.1)
    assert estimate_sigma(ramp) == pytest.approx(0.0, abs=1e-6)


def test_estimate_leaves_clipped_neighbourhoods_out():
    noisy = with_noise(torch.full((1, 1, 200, 200), 0.5), 0.05)
    noisy[..., 60:] = 1.0
    assert estimate_sigma(noisy) == pytest.approx(0.05, rel=0.1)
    assert estimate_sigma(torch.ones(1, 3, 8, 8)) == 0.0


@settings(max_examples=15)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    window=st.sampled_from([1, 5, 9]),
    patch=st.sampled_from([1, 3]),
    block_bytes=st.integers(1, 2**18),
)
def test_blocks_leave_no_trace(height, width, window, patch, block_bytes):
    image = random_image(2, 1, height, width, dtype=torch.float32)
    options = {"sigma": 0.2, "window": window, "patch": patch}
    whole = non_local_means(image, **options)
    torch.testing.assert_close(non_local_means(image, block_bytes=block_bytes, **options), whole, rtol=0, atol=2e-6)


@given(height=st.integers(1, 900), width=st.integers(1, 900), halo=st.integers(0, 40), pixels=st.integers(0, 10**5))
def test_blocks_cover_the_image_once_and_stay_small(height, width, halo, pixels):
    area, side = 0, max(2 * halo, 16)
    floor = side + 2 * halo
    blocks = list(nlm._blocks(height, width, halo, pixels))
    assert len(blocks) <= math.ceil(height / side) * math.ceil(width / side)
    for rows, columns in blocks:
        assert len(rows) > 0
        assert len(columns) > 0
        assert rows.stop <= height
        assert columns.stop <= width
        assert (len(rows) + 2 * halo) * (len(columns) + 2 * halo) <= max(pixels, floor**2)
        area += len(rows) * len(columns)
    assert area == height * width


def test_averages_stay_between_the_extremes_of_the_window():
    image = random_image(1, 2, 20, 20)
    got = non_local_means(image, sigma=0.3, window=5, patch=3)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2), mode="replicate")
    around = padded.unfold(2, 5, 1).unfold(3, 5, 1).flatten(4)
    assert (got <= around.amax(-1) + 1e-12).all()
    assert (got >= around.amin(-1) - 1e-12).all()


def test_infinite_strength_is_the_mean_of_the_window():
    image = random_image(1, 1, 12, 15)
    mean = torch.nn.functional.avg_pool2d(image, 5, 1, 2, count_include_pad=False)
    torch.testing.assert_close(non_local_means(image, sigma=0.1, strength=1e6, window=5), mean)


@pytest.mark.parametrize("change", [lambda x: x.flip(-1), lambda x: x.mT, lambda x: x[:, [2, 0, 1]], lambda x: x + 0.7])
def test_mirrors_swaps_and_brightness_pass_through(change):
    image = random_image(1, 3, 24, 17)
    options = {"sigma": 0.2, "window": 7, "patch": 3}
    torch.testing.assert_close(non_local_means(change(image), **options), change(non_local_means(image, **options)))


def test_images_of_a_batch_do_not_meet():
    image = random_image(3, 2, 16, 18)
    got = non_local_means(image, sigma=0.2, window=7, patch=3)
    alone = torch.cat([non_local_means(one[None], sigma=0.2, window=7, patch=3) for one in image])
    torch.testing.assert_close(got, alone)


def test_strides_and_dtypes(crop):
    noisy = with_noise(crop, 0.1)
    want = non_local_means(noisy.contiguous(), sigma=0.1)
    strided = noisy.to(memory_format=torch.channels_last)
    torch.testing.assert_close(non_local_means(strided, sigma=0.1), want)
    half = non_local_means(noisy.half(), sigma=0.1)
    assert half.dtype == torch.float16
    # The input's rounding moves weights too, hence more than an ulp of 2**-11.
    torch.testing.assert_close(half.float(), want, rtol=0, atol=5e-3)
    assert not non_local_means(noisy.clone().requires_grad_(), sigma=0.1).requires_grad


def test_fp32_resolves_little_noise_on_bright_ground():
    image = 0.9 + 0.002 * (random_image(1, 3, 40, 40) - 0.5)
    got, want = (non_local_means(x, sigma=0.0006).double() for x in (image.float(), image))
    torch.testing.assert_close(got, want, rtol=0, atol=torch.finfo(torch.float32).eps)


def test_autocast_does_not_reach_it(crop):
    want = non_local_means(crop, sigma=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(non_local_means(crop, sigma=0.05), want)


@pytest.mark.parametrize("options", [{"sigma": 0.0}, {"sigma": 0.1, "strength": 0.0}, {"sigma": 1e-7}])
def test_no_noise_no_change(crop, options):
    got = non_local_means(crop, **options)
    assert torch.equal(got, crop)
    assert got.data_ptr() != crop.data_ptr()


def test_flat_images_stay():
    flat = torch.full((1, 3, 30, 30), 0.25)
    torch.testing.assert_close(non_local_means(flat, sigma=0.1), flat)
    assert non_local_means(torch.empty(0, 3, 8, 8), sigma=0.1).shape == (0, 3, 8, 8)


def test_progress_counts_every_pixel():
    seen = []
    image = random_image(1, 1, 60, 70)
    non_local_means(image, sigma=0.1, window=5, block_bytes=2**16, progress=lambda *at: seen.append(at))
    done = [pixels for pixels, _ in seen]
    assert len(seen) > 3
    assert done == sorted(set(done))
    assert done[-1] == 60 * 70
    assert {total for _, total in seen} == {60 * 70}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"window": 4}, ValueError, "window must be odd and at least 1, got 4"),
        ({"window": 5.0}, TypeError, "window must be an int, got float"),
        ({"patch": 0}, ValueError, "patch must be odd and at least 1, got 0"),
        ({"sigma": -0.1}, ValueError, "sigma must be None or a finite number >= 0, got -0.1"),
        ({"sigma": math.nan}, ValueError, "sigma must be .* got nan"),
        ({"strength": math.inf}, ValueError, "strength must be .* got inf"),
        ({"patch_weights": "box"}, ValueError, "patch_weights must be .* got 'box'"),
        ({"block_bytes": 0}, ValueError, "block_bytes must be at least 1, got 0"),
        ({"image": torch.zeros(3, 8, 8)}, ValueError, r"image must be \[B, C, H, W\].* got shape \[3, 8, 8\]"),
        ({"image": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, TypeError, "image must be floating .* got torch.uint8"),
        ({"image": np.zeros((1, 3, 8, 8))}, TypeError, "image must be a torch.Tensor, got ndarray"),
        ({"image": torch.full((1, 1, 8, 8), math.nan)}, ValueError, "image must be finite"),
        ({"image": torch.zeros(1, 1, 2, 8), "sigma": None}, ValueError, "at least 3x3 .* got 2x8; give sigma"),
    ],
)
def test_errors_name_argument_and_value(options, error, words):
    arguments = {"image": torch.zeros(1, 3, 8, 8), "sigma": 0.1} | options
    with pytest.raises(error, match=words):
        non_local_means(**arguments)
