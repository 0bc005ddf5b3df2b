"""The layer: three 1x1 convolutions and local attention."""

from collections.abc import Sequence

from torch import Tensor, nn

from . import check
from .functional import local_attention

# The original extension's names of the three projections.
_FORMER_NAMES = {"conv1": "query", "conv2": "key", "conv3": "value"}


class LocalAttention(nn.Module):
    """Projects a map to query, key and value by 1x1 convolutions without bias and attends locally.

    inp_channels: channels of the input map. out_channels: channels of query, key, value and output.
    kH, kW: the window in pixels.
    heads, scale, border, backend: as in `local_attention`; the defaults are one head, no scaling, border "zeros".

    Input [B, inp_channels, H, W]; output [B, out_channels, H, W] in its memory format. Loads a state dict of the
    original extension's layer (`conv1`, `conv2`, `conv3`) as it is. Raises as `local_attention` does, the
    arguments of the constructor when it is built.
    """

    def __init__(
        self,
        inp_channels: int,
        out_channels: int,
        kH: int,
        kW: int,
        *,
        heads: int = 1,
        scale: float | None = 1.0,
        border: str | Sequence[str] = "zeros",
        dilation: int | Sequence[int] = 1,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check.layer(inp_channels, out_channels, heads)
        check.window((kH, kW), border, dilation, False)
        check.scale_factor(scale, out_channels // heads)
        check.backend_name(backend)
        self.kernel_size, self.heads, self.scale = (kH, kW), heads, scale
        self.border, self.dilation, self.backend = border, dilation, backend
        self.query, self.key, self.value = (
            nn.Conv2d(inp_channels, out_channels, kernel_size=1, bias=False) for _ in range(3)
        )
        self.register_load_state_dict_pre_hook(_rename_projections)

    def forward(self, x: Tensor) -> Tensor:
        return local_attention(
            self.query(x),
            self.key(x),
            self.value(x),
            self.kernel_size,
            heads=self.heads,
            scale=self.scale,
            border=self.border,
            dilation=self.dilation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, heads={self.heads}, scale={self.scale}, "
            f"border={self.border!r}, dilation={self.dilation}"
        )


def _rename_projections(module, state_dict, prefix, *_) -> None:
    for former, name in _FORMER_NAMES.items():
        if f"{prefix}{former}.weight" in state_dict:
            state_dict[f"{prefix}{name}.weight"] = state_dict.pop(f"{prefix}{former}.weight")
