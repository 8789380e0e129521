"""One attention form without a model around it, registered so that it is measured like a model.

Paper: `Attention Is All You Need`, for the default form
    - https://arxiv.org/abs/1706.03762
Source: our addition. The HoViT deck times whole models, where other layers can hide the cost of
attention.
Upstream: none.
"""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..attention.forms import FormName
from ..attention.modules import create_attention

default_cfgs = generate_default_cfgs({"attention_layer": {"num_classes": 0}})


class AttentionLayer(nn.Module):
    """An attention form on a square of tokens. It has no features and no classifier.

    Args:
        form: name of the form (`hovit.attention.forms`).
        side: side of the square in tokens.
        heads: heads.
        head_dim: channels of each head.
        windows: squares per image; tokens attend within their square.
        num_classes: 0; it has no classifier.
        in_chans: not used; timm passes it.
        device, dtype: of parameters.
        options: options of the form.

    Raises:
        RuntimeError: from the methods of timm's interface that need images or a classifier.
        AssertionError: for gradient checkpointing, as in timm.
    """

    def __init__(
        self,
        form: FormName = "dot",
        side: int = 14,
        heads: int = 4,
        head_dim: int = 64,
        windows: int = 1,
        num_classes: int = 0,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.num_classes = 0
        self.num_features = self.head_hidden_size = heads * head_dim
        self.shape = (windows, side * side, heads * head_dim)
        self.size = (side, side)
        self.attend = create_attention(form, heads * head_dim, heads, **options)
        self.to(device=device, dtype=dtype)

    def example_inputs(self, batch: int) -> tuple[Tensor, ...]:
        """q, k, v and x (the input of the block) for `batch` images: four of [B windows, N, C]."""
        windows, tokens, dim = self.shape
        return tuple(torch.randn(batch * windows, tokens, dim) for _ in range(4))

    def no_weight_decay(self) -> set[str]:
        """Names of the matrices without weight decay: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One group: there is one layer."""
        return {"stem": r"^", "blocks": []}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refuse checkpointing, as timm does: one layer has nothing to recompute."""
        assert not enable, "gradient checkpointing not supported"

    def get_classifier(self) -> nn.Module:
        """Identity: there is no classifier."""
        return nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Accept 0 classes only.

        Raises:
            RuntimeError: for any other number.
        """
        if num_classes:
            raise RuntimeError("reset_classifier not implemented for AttentionLayer.")

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Not available.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("forward_intermediates not implemented for AttentionLayer.")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return self.attend(q, k, v, x, self.size)


@register_model
def attention_layer(pretrained: bool = False, **kwargs: Any) -> AttentionLayer:
    """One attention form: 14 x 14 tokens in 4 heads of 64 by default."""
    if kwargs.get("features_only"):
        raise RuntimeError("features_only not implemented for AttentionLayer.")
    return build_model_with_cfg(AttentionLayer, "attention_layer", pretrained, **kwargs)
