"""Swin with another attention in its windows.

Paper: `Swin Transformer: Hierarchical Vision Transformer using Shifted Windows`
    - https://arxiv.org/abs/2103.14030
Seed: the HoViT slide deck (seeds/000), slides "01 Swin Based Approach": Swin + FLatten
Transformer, and Swin + Similarity on CIFAR-10. All but the attention is timm's.

With `attention="dot"` it is timm's Swin and nothing else. A form without a softmax (`focused`,
`gated`) knows neither position bias nor mask: its blocks have no bias and are not shifted, so that
no window mixes two sides of the image. FLatten's own windows are the whole map, which has no shift
either.
"""

import copy
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from torch import Tensor

from ..attention.modules import ALL_OPTIONS, check_attention, create_attention
from ..attention.similarity import SIMILARITIES


class FormAttention(WindowAttention):
    """timm's window attention with another form in place of softmax(q k^T) v.

    Args:
        old: the attention that it replaces; begins with its weights.
        form: the form's name.
        options: the form's own.
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
        self.biased = form in SIMILARITIES
        if not self.biased:
            del self.relative_position_bias_table
        self.load_state_dict(old.state_dict(), strict=False)
        attend = create_attention(
            form, self.dim, self.num_heads, tokens=self.window_area, **options
        )
        self.attend = attend.to(old.qkv.weight)  # its device and dtype

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """As timm's.

        Raises:
            ValueError: for another size of a window without softmax, which learned its positions.
        """
        if self.biased:
            super().set_window_size(window_size)
        elif tuple(window_size) != tuple(self.window_size):
            old, new = ("x".join(map(str, size)) for size in (self.window_size, window_size))
            raise ValueError(
                f"a window of {new} for {old}: without softmax it stays as it was made"
            )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B windows, N, C] -> the same; mask [windows, N, N] or None."""
        q, k, v = self.qkv(x).chunk(3, dim=2)
        bias = self._get_rel_pos_bias() if self.biased else None  # [1, heads, N, N]
        if bias is not None and mask is not None:
            bias = bias + mask[:, None]  # [windows, heads, N, N]
        return self.proj_drop(self.proj(self.attend(q, k, v, x, self.window_size, bias)))


class FormSwin(SwinTransformer):
    """timm's Swin with another attention in some stages.

    Args:
        attention: the form's name, `dot` being timm's own.
        form_stages: stages, counted from 0, that have it; all, unless told. FLatten-Swin has
            focused attention in the first two.
        kwargs: the form's own options, and timm's.

    Raises:
        ValueError: for a form, an option or a stage that there is not, or for attention dropout or
            a head_dim in another form than `dot`.
    """

    def __init__(
        self,
        attention: str = "dot",
        form_stages: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        options = {name: kwargs.pop(name) for name in ALL_OPTIONS if name in kwargs}
        check_attention(attention, options)
        super().__init__(**kwargs)
        stages = range(len(self.layers))
        form_stages = tuple(stages) if form_stages is None else form_stages
        if unknown := [i for i in form_stages if i not in stages]:
            raise ValueError(f"form_stages: no stage {unknown[0]!r}; they are 0 to {stages[-1]}")
        if attention == "dot":
            return
        for name, words in (("attn_drop_rate", "attention dropout"), ("head_dim", "head_dim")):
            if kwargs.get(name):
                raise ValueError(f"attention={attention!r} has no {words}")
        for i in form_stages:
            stage: Any = self.layers[i]
            for block in stage.blocks:
                block.attn = FormAttention(block.attn, attention, **options)
                if not block.attn.biased:
                    block.shift_size = block.target_shift_size = (0, 0)  # now, and if resized
                    block.attn_mask = None

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As timm's, or nothing at all: a copy is resized first.

        Raises:
            ValueError: for a size that changes a window without softmax.
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


default_cfgs = generate_default_cfgs(
    {
        "swin_tiny_patch2_window4_32": _cfg(input_size=(3, 32, 32)),
        "flatten_swin_tiny_patch2_window16_32": _cfg(input_size=(3, 32, 32)),
        "flatten_swin_tiny_patch4_window56_224": _cfg(input_size=(3, 224, 224)),
    }
)
TINY: dict[str, Any] = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}


@register_model
def swin_tiny_patch2_window4_32(pretrained: bool = False, **kwargs: Any) -> FormSwin:
    """Swin-T for CIFAR-10's 32 x 32 pixels: patch 2, window 4 (ours; the deck states neither)."""
    args = {**TINY, "img_size": 32, "patch_size": 2, "window_size": 4}
    return build_model_with_cfg(
        FormSwin, "swin_tiny_patch2_window4_32", pretrained, **args | kwargs
    )


@register_model
def flatten_swin_tiny_patch2_window16_32(pretrained: bool = False, **kwargs: Any) -> FormSwin:
    """The same with focused attention in stages 1 and 2, whose windows are the whole map (ours)."""
    focused = {"window_size": 16, "attention": "focused", "form_stages": (0, 1)}
    args = {**TINY, "img_size": 32, "patch_size": 2, **focused}
    return build_model_with_cfg(
        FormSwin, "flatten_swin_tiny_patch2_window16_32", pretrained, **args | kwargs
    )


@register_model
def flatten_swin_tiny_patch4_window56_224(pretrained: bool = False, **kwargs: Any) -> FormSwin:
    """FLatten-Swin-T: focused attention over the whole map in stages 1 and 2, softmax after."""
    focused = {"window_size": (56, 56, 7, 7), "attention": "focused", "form_stages": (0, 1)}
    args = {**TINY, **focused, "drop_path_rate": 0.2}
    return build_model_with_cfg(
        FormSwin, "flatten_swin_tiny_patch4_window56_224", pretrained, **args | kwargs
    )
