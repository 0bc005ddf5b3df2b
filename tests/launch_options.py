"""Launches every kernel with the options of windows on a GPU, for compute-sanitizer to look on: make gpu-memcheck.

Maps are of several tiles each way and a remainder, in both memory formats; those of keys have rows of whole vectors,
those of queries on another grid have not.
"""

import itertools

import torch

from image_local_attention import local_aggregate, local_attention, local_similarity

SIZE = 19, 24
KERNEL = 5, 7
DEPTH, HEADS = 16, 2


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def options() -> list[dict]:
    mask = torch.rand(2, *SIZE, device="cuda") < 0.8
    slots, displacements = normal(HEADS, KERNEL[0] * KERNEL[1]), normal(HEADS, 2 * KERNEL[0] - 1, 2 * KERNEL[1] - 1)
    return [
        {},
        {"border": "mask", "kv_heads": 1},
        {"border": "shift", "bias": displacements},
        {"border": "shift", "bias": displacements, "dilation": (2, 3)},
        {"border": "reflect", "bias": slots, "key_mask": mask},
        {"border": "replicate", "dilation": 2},
        {"border": "mask", "dilation": (1, 2), "key_mask": mask},
        {"border": "circular"},
        {"border": "mask", "causal": "raster", "key_mask": mask, "bias": slots},
        {"causal": True, "dilation": 2, "bias": slots},
    ]


def launch(queries: tuple[int, int], channels_last: bool, option: dict) -> None:
    """Forward and backward of all three operators."""
    kv_heads = option.get("kv_heads", HEADS)
    maps = normal(2, HEADS * DEPTH, *queries), *(normal(2, kv_heads * DEPTH, *SIZE) for _ in range(2))
    if channels_last:
        maps = [x.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for x in maps]
    query, key, value = maps
    option = option | {"heads": HEADS, "backend": "triton"}
    out, lse = local_attention(*maps, KERNEL, return_lse=True, **option)
    weight = local_similarity(query, key, KERNEL, **option)
    geometry = {name: each for name, each in option.items() if name not in ("bias", "key_mask")}
    unfused = local_aggregate(weight.masked_fill(weight.isinf(), 0.0), value, KERNEL, **geometry)
    (out.sum() + lse.sum() + unfused.sum()).backward()
    torch.cuda.synchronize()


def main() -> None:
    for queries, channels_last, option in itertools.product((SIZE, (40, 11)), (False, True), options()):
        launch(queries, channels_last, option)


if __name__ == "__main__":
    main()
