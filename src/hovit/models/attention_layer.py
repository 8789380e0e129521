"""One attention and nothing around it, to be measured like a model: q, k and v in, tokens out.

Ours: the deck times whole models, in which an attention's own cost can drown.
"""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..attention.modules import create_attention

default_cfgs = generate_default_cfgs({"attention_layer": {"num_classes": 0}})


class AttentionLayer(nn.Module):
    """An attention form on a square of tokens.

    Args:
        form: its name.
        side: tokens a side of the square.
        heads: heads.
        head_dim: channels of each.
        windows: squares an image holds; each attends within itself.
        num_classes, in_chans: not used; timm passes them.
        options: the form's own.
    """

    def __init__(
        self,
        form: str = "dot",
        side: int = 14,
        heads: int = 4,
        head_dim: int = 64,
        windows: int = 1,
        num_classes: int = 0,
        in_chans: int = 3,
        **options: Any,
    ) -> None:
        super().__init__()
        self.shape = (windows, side * side, heads * head_dim)
        self.size = (side, side)
        self.attend = create_attention(form, heads * head_dim, heads, **options)

    def example_inputs(self, batch: int) -> tuple[Tensor, ...]:
        """q, k, v and the block's input x for so many images: four of [B windows, N, C]."""
        windows, tokens, dim = self.shape
        return tuple(torch.randn(batch * windows, tokens, dim) for _ in range(4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return self.attend(q, k, v, x, self.size)


@register_model
def attention_layer(pretrained: bool = False, **kwargs: Any) -> AttentionLayer:
    """An attention form by itself: 14 x 14 tokens in 4 heads of 64 unless told."""
    return build_model_with_cfg(AttentionLayer, "attention_layer", pretrained, **kwargs)
