"""What is timed: problems as data, the least time each can take, and the times others took."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# What one H200 does per second.
BYTES = 4.3e12
EXPONENTIALS = 4.2e12
HALF, TF32 = 790e12, 395e12
FLOPS = {
    ("bf16", "ieee"): HALF,
    ("fp16", "ieee"): HALF,
    ("fp32", "tf32"): TF32,
    ("fp32", "ieee"): TF32 / 3,  # three passes
}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = ("channels_last", "nchw")
MODES = ("forward", "backward", "forward+backward")
PRESENT = 0.9  # of the keys under a key_mask


@dataclass(frozen=True)
class Case:
    """One problem: `depth` channels per head in query and key, `depth_value` (None: as many) in value and output.

    precision: of fp32 products, "ieee" or "tf32". layout: of the maps [B, heads*D, H, W] in memory.
    """

    batch: int
    height: int
    width: int
    heads: int
    depth: int
    kernel: int
    dtype: str
    precision: str = "ieee"
    layout: str = "channels_last"
    depth_value: int | None = None
    border: str = "zeros"
    dilation: int = 1

    @property
    def name(self) -> str:
        depth = f"{self.depth}" if self.depth_value is None else f"{self.depth}:{self.depth_value}"
        size = f"{self.batch}x{self.height}x{self.width} {self.heads}x{depth} k{self.kernel}"
        size = size if self.dilation == 1 else f"{size} d{self.dilation}"
        dtype = self.dtype if self.dtype != "fp32" else f"fp32-{self.precision}"
        border = "" if self.border == "zeros" else f" {self.border}"
        return f"{size} {dtype} {self.layout}{border}"

    @property
    def depths(self) -> tuple[int, int]:
        """Channels per head of query and key, and of value and output."""
        return self.depth, self.depth if self.depth_value is None else self.depth_value

    @property
    def queries(self) -> int:
        return self.batch * self.height * self.width * self.heads

    def bytes(self, mode: str) -> int:
        """Least memory traffic. Forward: four maps. Backward: eight maps and the log-sum-exp."""
        element = DTYPES[self.dtype].itemsize
        forward = self.queries * 2 * sum(self.depths) * element
        return self._sum(mode, forward, 2 * forward + 4 * self.queries)

    def flops(self, mode: str) -> int:
        """Useful flops of matrix products. Forward: two products. Backward: the scores again and four more."""
        depth, depth_value = self.depths
        scores = self.exponentials("forward")
        return self._sum(mode, scores * 2 * (depth + depth_value), scores * (6 * depth + 4 * depth_value))

    def exponentials(self, mode: str) -> int:
        scores = self.queries * self.kernel**2
        return self._sum(mode, scores, scores)

    def floor_ms(self, mode: str) -> float:
        """Least time on one H200: of bytes, flops and exponentials, the slowest; pass by pass."""
        if mode == "forward+backward":
            return self.floor_ms("forward") + self.floor_ms("backward")
        flops_per_s = FLOPS[self.dtype, self.precision]
        return 1e3 * max(
            self.bytes(mode) / BYTES, self.flops(mode) / flops_per_s, self.exponentials(mode) / EXPONENTIALS
        )

    def maps(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random query, key, value and gradient of the output; the logits' deviation is 1 at scale 1."""
        generator = torch.Generator(device).manual_seed(0)
        query_depth, value_depth = self.depths

        def normal(depth: int) -> Tensor:
            size = self.batch, self.height, self.width, self.heads * depth
            x = torch.randn(size, generator=generator, device=device, dtype=DTYPES[self.dtype]).permute(0, 3, 1, 2)
            return x if self.layout == "channels_last" else x.contiguous()

        query = normal(query_depth).mul_(self.depth**-0.5)
        return query, normal(query_depth), normal(value_depth), normal(value_depth)

    def bias(self, device: torch.device, by_displacement: bool = False) -> Tensor:
        """Random, [heads, kH*kW] by slot or [heads, 2*kH-1, 2*kW-1] by displacement."""
        size = (2 * self.kernel - 1, 2 * self.kernel - 1) if by_displacement else (self.kernel**2,)
        return torch.randn(self.heads, *size, device=device, dtype=DTYPES[self.dtype])

    def key_mask(self, device: torch.device) -> Tensor:
        """[B, H, W], True for PRESENT of the keys at random."""
        return torch.rand(self.batch, self.height, self.width, device=device) < PRESENT

    @staticmethod
    def _sum(mode: str, forward: int, backward: int) -> int:
        return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[mode]


def sketch_ms(case: Case, mode: str) -> float | None:
    """What the design's sketch took on one H200, its delta pass left out; None where it was not timed."""
    if case not in PROTOTYPE:
        return None
    forward, *backward = PROTOTYPE[case]
    return {"forward": forward, "backward": sum(backward), "forward+backward": forward + sum(backward)}[mode]


def extension_ms(case: Case, mode: str) -> float | None:
    """What the original CUDA extension took on one H200; None where it was not timed."""
    if case not in EXTENSION:
        return None
    forward, both = EXTENSION[case]
    return {"forward": forward, "backward": both - forward, "forward+backward": both}[mode]


# Forward, dQ and dK,dV in ms on one H200 (torch 2.11, triton 3.6), the L2 cache not flushed: the design's table.
PROTOTYPE = {
    Case(8, 128, 128, 8, 64, 7, "bf16"): (0.230, 0.251, 0.551),
    Case(8, 128, 128, 8, 64, 13, "bf16"): (0.374, 0.453, 0.831),
    Case(8, 128, 128, 8, 128, 13, "bf16"): (0.615, 1.015, 1.358),
    Case(1, 512, 512, 1, 64, 21, "bf16"): (0.169, 0.200, 0.352),
    Case(1, 512, 512, 4, 16, 7, "bf16"): (0.130, 0.151, 0.340),
    Case(1, 512, 512, 4, 16, 21, "bf16"): (0.386, 0.479, 0.953),
    Case(1, 2048, 2048, 1, 32, 7, "bf16"): (0.522, 0.647, 1.52),
    Case(4, 64, 64, 2, 64, 7, "bf16"): (0.0118, 0.0173, 0.0254),
    Case(1, 256, 256, 24, 128, 81, "bf16"): (13.9, 18.5, 27.2),
    Case(1, 512, 512, 1, 64, 5, "fp32", "tf32"): (0.116, 0.181, 0.259),
    Case(1, 512, 512, 1, 64, 5, "fp32"): (0.370, 0.371, 0.528),
    Case(1, 512, 512, 1, 64, 11, "fp32", "tf32"): (0.196, 0.416, 0.679),
    Case(1, 512, 512, 1, 64, 11, "fp32"): (0.746, 1.01, 1.41),
    Case(1, 512, 512, 1, 16, 11, "fp32"): (0.182, 0.321, 0.593),
    Case(1, 128, 128, 1, 64, 21, "fp32"): (0.099, 0.131, 0.181),
}

# Forward and forward+backward in ms on one H200: the original's grid.
EXTENSION = {
    Case(1, 128, 128, 1, 64, 5, "fp32", layout="nchw"): (0.62, 1.14),
    Case(1, 128, 128, 1, 64, 11, "fp32", layout="nchw"): (0.92, 2.12),
    Case(1, 128, 128, 1, 64, 21, "fp32", layout="nchw"): (2.00, 5.94),
    Case(1, 512, 512, 1, 64, 11, "fp32", layout="nchw"): (14.6, 41.8),
}

# What that extension was published with.
ORIGINAL = tuple(
    Case(1, side, side, 1, depth, kernel, "fp32", layout="nchw")
    for side in (32, 64, 128)
    for depth in (16, 32, 64)
    for kernel in (5, 11, 21)
)

# What image models ask for: restoration (180 and 60 channels in 6 heads), segmentation (33 channels, fp32), wide
# windows, dilation, a photograph of 4 megapixels, values wider than keys.
MODELS = (
    Case(4, 64, 64, 6, 30, 9, "bf16"),
    Case(1, 180, 320, 6, 30, 9, "bf16"),
    Case(1, 180, 320, 6, 10, 9, "bf16"),
    Case(2, 128, 128, 1, 33, 9, "fp32"),
    Case(1, 128, 128, 4, 48, 31, "bf16"),
    Case(1, 256, 256, 4, 32, 7, "bf16", dilation=9),
    Case(1, 2048, 2048, 1, 64, 5, "fp16"),
    Case(1, 256, 256, 4, 16, 9, "bf16", depth_value=96),
)


def _in_both_layouts(cases: Iterable[Case]) -> tuple[Case, ...]:
    return tuple(replace(case, layout=layout) for case in cases for layout in LAYOUTS)


GROUPS = {
    "design": _in_both_layouts(PROTOTYPE),
    "original": tuple(dict.fromkeys((*ORIGINAL, *EXTENSION))),
    "models": _in_both_layouts(MODELS),
    "cpu": tuple(case for case in EXTENSION if case.height == 128),
}

# On a CPU: how many times the time, and the memory, the unfold code is to take against ours.
CPU_GOALS = {
    (5, "forward"): (30, None),
    (11, "forward"): (250, 50),
    (11, "forward+backward"): (120, 50),
}
