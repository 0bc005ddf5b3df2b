"""Non-local means here and in scikit-image: PSNR and seconds on the shipped photograph.

python -m benchmarks.denoise
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from image_local_attention.nlm import non_local_means

PHOTOGRAPH = Path(__file__).parent.parent / "examples" / "photograph.png"
SIGMA = 25 / 255
WINDOW, PATCH = 21, 5
WANTED_GAIN_DB = 6.0
RUNS = 3


def photograph() -> np.ndarray:
    """[H, W, 3] in [0, 1]."""
    with Image.open(PHOTOGRAPH) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.float64) / 255


def add_noise(image: np.ndarray, seed: int = 0) -> np.ndarray:
    """White Gaussian noise, clipped as a camera clips it."""
    return (image + np.random.default_rng(seed).normal(0.0, SIGMA, image.shape)).clip(0.0, 1.0)


def psnr(image: np.ndarray, clean: np.ndarray) -> float:
    return float(-10.0 * np.log10(np.square(image - clean).mean()))


def ours(noisy: np.ndarray, device: str) -> np.ndarray:
    image = torch.from_numpy(noisy).float().permute(2, 0, 1)[None]
    clean = non_local_means(image, sigma=SIGMA, window=WINDOW, patch=PATCH, device=device)
    return clean[0].permute(1, 2, 0).double().numpy()


def scikit_image(noisy: np.ndarray) -> np.ndarray:
    from skimage.restoration import denoise_nl_means

    options = {"patch_size": PATCH, "patch_distance": WINDOW // 2, "h": SIGMA, "fast_mode": False}
    return denoise_nl_means(noisy, channel_axis=-1, **options)


def timed(fn: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """The result and the median seconds of a few calls, after one that warms up."""
    result, seconds = fn(), []
    for _ in range(RUNS):
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


def main() -> None:
    clean = photograph()
    noisy = add_noise(clean)
    height, width = clean.shape[:2]
    theirs, their_seconds = timed(lambda: scikit_image(noisy))
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    results = {device: timed(lambda device=device: ours(noisy, device)) for device in devices}

    table = Table(title=f"photograph {width}x{height} RGB, noise 25 of 255, window {WINDOW}, patch {PATCH}, h = sigma")
    for name in ("", "PSNR dB", "gain dB", "seconds", "difference"):
        table.add_column(name, justify="right" if name else "left")
    before = psnr(noisy, clean)
    table.add_row("noisy", f"{before:.2f}", "", "", "")

    def add(name: str, image: np.ndarray, seconds: float) -> None:
        after, difference = psnr(image, clean), np.abs(image - theirs).mean()
        table.add_row(name, f"{after:.2f}", f"{after - before:.2f}", f"{seconds:.2f}", f"{difference:.5f}")

    add("scikit-image, exact mode", theirs, their_seconds)
    for device, (image, seconds) in results.items():
        threads = f", threads: {torch.get_num_threads()}" if device == "cpu" else ""
        add(f"ours, {device}{threads}", image, seconds)
    Console().print(table)

    image, seconds = results["cpu"]
    if psnr(image, clean) < before + WANTED_GAIN_DB or seconds > their_seconds:
        sys.exit(f"wanted: at least {WANTED_GAIN_DB} dB, and no longer than scikit-image on the CPU")


if __name__ == "__main__":
    main()
