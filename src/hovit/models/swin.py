"""Swin with another attention form in its windows.

Paper: `Swin Transformer: Hierarchical Vision Transformer using Shifted Windows`
    - https://arxiv.org/abs/2103.14030
`FLatten Transformer: Vision Transformer using Focused Linear Attention`
    - https://arxiv.org/abs/2308.00442
Source: the HoViT deck, "01 Swin Based Approach": Swin + FLatten Transformer, and Swin +
Similarity on CIFAR-10.
Upstream: timm/models/swin_transformer.py; everything but the attention is unchanged.

With `attention="dot"` the model is timm's Swin. A form without a softmax (`focused`, `gated`) takes
neither a position bias nor a mask: its blocks have no bias and no shift, so that no window mixes
two sides of the image. FLatten's own windows cover the whole map and need no shift either.
"""

import copy
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from torch import Tensor

from ..attention.forms import ATTENTION_OPTIONS, FormName, get_form
from ..attention.modules import check_attention, create_attention
from .build import build_model


class SwinAttention(WindowAttention):
    """timm's window attention with another form in place of softmax(q k^T) v.

    Args:
        old: the attention to replace; its weights are copied.
        form: name of the attention form.
        options: options of the form.
    """

    def __init__(self, old: WindowAttention, form: str, **options: Any) -> None:
        super().__init__(
            old.dim,
            old.num_heads,
            window_size=old.window_size,
            qkv_bias=old.qkv.bias is not None,
            proj_drop=old.proj_drop.p,
            device=old.qkv.weight.device,
            dtype=old.qkv.weight.dtype,
        )
        self.has_bias = get_form(form).softmax
        if not self.has_bias:
            del self.relative_position_bias_table
        self.load_state_dict(old.state_dict(), strict=False)
        attend = create_attention(
            form, self.dim, self.num_heads, tokens=self.window_area, **options
        )
        self.attend = attend.to(old.qkv.weight)  # its device and dtype

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Change the window size, as in timm.

        Raises:
            ValueError: if the form has no softmax: its parameters fit one window size only.
        """
        if self.has_bias:
            super().set_window_size(window_size)
        elif tuple(window_size) != tuple(self.window_size):
            old, new = ("x".join(map(str, size)) for size in (self.window_size, window_size))
            raise ValueError(
                f"a window of {new} for {old}: attention without softmax has a fixed window size"
            )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B windows, N, C] -> the same; mask [windows, N, N] or None."""
        q, k, v = self.qkv(x).chunk(3, dim=2)
        bias = self._get_rel_pos_bias() if self.has_bias else None  # [1, heads, N, N]
        if bias is not None and mask is not None:
            bias = bias + mask[:, None]  # [windows, heads, N, N]
        return self.proj_drop(self.proj(self.attend(q, k, v, x, self.window_size, bias)))


class Swin(SwinTransformer):
    """timm's Swin with another attention form in some stages.

    Args:
        attention: name of the form; `dot` is timm's own attention.
        attention_stages: stages, counted from 0, that use the form; by default all. FLatten-Swin
            uses focused attention in the first two.
        kwargs: options of the form, and arguments of timm's Swin.

    Raises:
        ValueError: for an unknown form, option or stage; for attention dropout or a head_dim with
            any form but `dot`.
    """

    def __init__(
        self,
        attention: FormName = "dot",
        attention_stages: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        options = {name: kwargs.pop(name) for name in ATTENTION_OPTIONS if name in kwargs}
        check_attention(attention, options)
        super().__init__(**kwargs)
        stages = range(len(self.layers))
        attention_stages = tuple(stages) if attention_stages is None else attention_stages
        if unknown := [i for i in attention_stages if i not in stages]:
            raise ValueError(
                f"attention_stages: no stage {unknown[0]!r}; they are 0 to {stages[-1]}"
            )
        if attention == "dot":
            return
        for name, words in (("attn_drop_rate", "attention dropout"), ("head_dim", "head_dim")):
            if kwargs.get(name):
                raise ValueError(f"attention={attention!r} has no {words}")
        for i in attention_stages:
            stage: Any = self.layers[i]
            for block in stage.blocks:
                block.attn = SwinAttention(block.attn, attention, **options)
                if not block.attn.has_bias:
                    block.shift_size = block.target_shift_size = (0, 0)  # also after a resize
                    block.attn_mask = None

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Change the image, patch or window size, as in timm; on an error, change nothing.

        Raises:
            ValueError: for a size that changes a window of attention without softmax.
        """
        SwinTransformer.set_input_size(copy.deepcopy(self), *args, **kwargs)
        super().set_input_size(*args, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "fixed_input_size": True,
        "pool_size": None,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
    } | kwargs


TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
CIFAR = {**TINY, "img_size": 32, "patch_size": 2}
FLATTEN = {"attention": "focused", "attention_stages": (0, 1)}
MODEL_ARGS: dict[str, dict[str, Any]] = {
    "swin_tiny_patch2_window4_32": {**CIFAR, "window_size": 4},
    "flatten_swin_tiny_patch2_window16_32": {**CIFAR, **FLATTEN, "window_size": 16},
    "flatten_swin_tiny_patch4_window56_224": {
        **TINY, **FLATTEN, "window_size": (56, 56, 7, 7), "drop_path_rate": 0.2,
    },
}  # fmt: skip
default_cfgs = generate_default_cfgs(
    {
        "swin_tiny_patch2_window4_32": _cfg(input_size=(3, 32, 32)),
        "flatten_swin_tiny_patch2_window16_32": _cfg(input_size=(3, 32, 32)),
        "flatten_swin_tiny_patch4_window56_224": _cfg(input_size=(3, 224, 224)),
    }
)


def _swin(variant: str, pretrained: bool, **kwargs: Any) -> Swin:
    args = MODEL_ARGS[variant] | kwargs
    feature_cfg = {"flatten_sequential": True, "out_indices": tuple(range(len(args["depths"])))}
    return build_model(Swin, variant, pretrained, feature_cfg=feature_cfg, **args)


@register_model
def swin_tiny_patch2_window4_32(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Swin-T for CIFAR-10's 32 x 32 pixels: patch 2, window 4 (our choice; not in the deck)."""
    return _swin("swin_tiny_patch2_window4_32", pretrained, **kwargs)


@register_model
def flatten_swin_tiny_patch2_window16_32(pretrained: bool = False, **kwargs: Any) -> Swin:
    """The same with focused attention over the whole map in stages 1 and 2 (our choice)."""
    return _swin("flatten_swin_tiny_patch2_window16_32", pretrained, **kwargs)


@register_model
def flatten_swin_tiny_patch4_window56_224(pretrained: bool = False, **kwargs: Any) -> Swin:
    """FLatten-Swin-T: focused attention over the whole map in stages 1 and 2, softmax after."""
    return _swin("flatten_swin_tiny_patch4_window56_224", pretrained, **kwargs)
