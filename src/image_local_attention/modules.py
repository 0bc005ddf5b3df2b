"""The layer: three 1x1 convolutions and local attention."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import check
from .functional import local_attention

# The original extension's names of the three projections.
_FORMER_NAMES = {"conv1": "query", "conv2": "key", "conv3": "value"}


class LocalAttention(nn.Module):
    """Projects a map to query, key and value by 1x1 convolutions without bias and attends locally.

    inp_channels: channels of the input maps. out_channels: channels of query and output.
    kH, kW: the window in pixels.
    heads, kv_heads, scale, border, dilation, causal, backend: as in `local_attention`; the defaults are one head, no
        scaling, border "zeros". Key and value have out_channels // heads channels for each of kv_heads.
    position_bias: learn a bias of the logits, the parameter `position_bias`, zero at first: [heads, kH, kW] by window
        slot, and where the border shifts windows [heads, 2*kH-1, 2*kW-1] by displacement.

    Input [B, inp_channels, H, W], and optionally a second map, `context` [B, inp_channels, Hk, Wk], that keys and
    values are made of, and `key_mask`, bool [B, Hk, Wk], False where a key does not take part. Output
    [B, out_channels, H, W] in the memory format of the input. Loads a state dict of the original extension's layer
    (`conv1`, `conv2`, `conv3`) as it is. Raises as `local_attention` does, the arguments of the constructor when it
    is built.
    """

    def __init__(
        self,
        inp_channels: int,
        out_channels: int,
        kH: int,
        kW: int,
        *,
        heads: int = 1,
        kv_heads: int | None = None,
        scale: float | None = 1.0,
        border: str | Sequence[str] = "zeros",
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] | str = False,
        position_bias: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        kv_heads = check.layer(inp_channels, out_channels, heads, kv_heads)
        window = check.window((kH, kW), border, dilation, causal)
        check.scale_factor(scale, out_channels // heads)
        check.flag("position_bias", position_bias)
        check.backend_name(backend)
        self.kernel_size, self.heads, self.kv_heads, self.scale = (kH, kW), heads, kv_heads, scale
        self.border, self.dilation, self.causal, self.backend = border, dilation, causal, backend
        self.query = nn.Conv2d(inp_channels, out_channels, kernel_size=1, bias=False)
        self.key, self.value = (
            nn.Conv2d(inp_channels, out_channels // heads * kv_heads, kernel_size=1, bias=False) for _ in range(2)
        )
        self.position_bias = None
        if position_bias:
            shape = (2 * kH - 1, 2 * kW - 1) if "shift" in window.border else (kH, kW)
            self.position_bias = nn.Parameter(torch.zeros(heads, *shape))
        self.register_load_state_dict_pre_hook(_rename_projections)

    def forward(self, x: Tensor, context: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return local_attention(
            self.query(x),
            self.key(context),
            self.value(context),
            self.kernel_size,
            heads=self.heads,
            kv_heads=self.kv_heads,
            scale=self.scale,
            border=self.border,
            dilation=self.dilation,
            causal=self.causal,
            bias=self.position_bias,
            key_mask=key_mask,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, heads={self.heads}, kv_heads={self.kv_heads}, scale={self.scale}, "
            f"border={self.border!r}, dilation={self.dilation}, causal={self.causal!r}, "
            f"position_bias={self.position_bias is not None}"
        )


def _rename_projections(module, state_dict, prefix, *_) -> None:
    for former, name in _FORMER_NAMES.items():
        if f"{prefix}{former}.weight" in state_dict:
            state_dict[f"{prefix}{name}.weight"] = state_dict.pop(f"{prefix}{former}.weight")
