"""A demonstration on the spot: the command line on a photograph, then time and memory against plain PyTorch.

python -m benchmarks.demo
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.denoise import WANTED_GAIN_DB, add_noise, photograph, psnr
from image_local_attention import local_attention
from image_local_attention.bench.measure import Measurement, measure
from image_local_attention.bench.unfold import unfold_attention

FOLDER = Path("demo")
CHANNELS = 64
KERNELS = (5, 11, 21)


def denoise_photograph(console: Console) -> Path:
    """Run the command line on a noisy photograph; returns the picture that shows what it did."""
    FOLDER.mkdir(exist_ok=True)
    noisy, cleaned, compare = (FOLDER / f"{name}.png" for name in ("noisy", "cleaned", "compare"))
    clean = photograph()
    Image.fromarray((add_noise(clean) * 255).round().astype("u1")).save(noisy)
    command = ["image_local_attention.cli", "denoise", str(noisy), str(cleaned), "--compare", str(compare)]
    console.print(f"$ image-local-attention {' '.join(command[1:])}", highlight=False, soft_wrap=True)
    subprocess.run([sys.executable, "-m", *command], check=True)
    before, after = (psnr(np.asarray(Image.open(path)) / 255, clean) for path in (noisy, cleaned))
    console.print(f"PSNR {before:.2f} dB before, {after:.2f} dB after: {after - before:+.2f} dB\n", highlight=False)
    if after < before + WANTED_GAIN_DB:
        sys.exit(f"wanted: at least {WANTED_GAIN_DB} dB")
    return compare


def measured(attend: Callable, kernel: int, side: int, device: str, backward: bool) -> Measurement:
    generator = torch.Generator(device).manual_seed(0)
    shape = (4, 1, CHANNELS, side, side)
    *maps, gradient = torch.randn(shape, generator=generator, device=device).mul_(CHANNELS**-0.25).unbind()

    def forward():
        with torch.no_grad():
            return attend(*maps, kernel)

    def forward_backward():
        leaves = [x.detach().requires_grad_() for x in maps]
        return torch.autograd.grad(attend(*leaves, kernel), leaves, gradient)

    return measure(forward_backward if backward else forward, device)


def compare_with_plain(console: Console) -> None:
    device, side = ("cuda", 128) if torch.cuda.is_available() else ("cpu", 64)
    place = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"maps of 1x{CHANNELS}x{side}x{side}, fp32, {place}; plain: unfold + matmul in PyTorch")
    for name in ("window", "pass", "plain\nms", "ours\nms", "relative\ntime", "plain\nMiB", "ours\nMiB"):
        table.add_column(name, justify="right")
    table.add_column("relative\nmemory", justify="right")
    with console.status("measuring; plain PyTorch takes its time at 21x21"):
        for backward in (False, True):
            for kernel in KERNELS:
                plain = measured(lambda q, k, v, n: unfold_attention(q, k, v, n, n), kernel, side, device, backward)
                ours = measured(local_attention, kernel, side, device, backward)
                table.add_row(
                    f"{kernel}x{kernel}",
                    "fwd+bwd" if backward else "fwd",
                    *(f"{plain.ms_p50:.1f}", f"{ours.ms_p50:.1f}", f"{ours.ms_p50 / plain.ms_p50:.1%}"),
                    *(f"{plain.peak_mib:.0f}", f"{ours.peak_mib:.1f}", f"{ours.peak_mib / plain.peak_mib:.1%}"),
                )
    console.print(table)


def main() -> None:
    console = Console()
    compare = denoise_photograph(console)
    compare_with_plain(console)
    console.print(f"\nBefore, after and difference: {compare}", highlight=False)


if __name__ == "__main__":
    main()
