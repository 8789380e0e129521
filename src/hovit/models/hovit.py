"""HoViT: the Highly shrunk and Optimized Vision Transformer.

Paper: none; the HoViT deck, "05 Conclusion". HoViT builds on LeViT
    - https://arxiv.org/abs/2104.01136
Upstream: none is published.

Combines three of the deck's ideas on its LeViT: two blocks per stage, a convolution in place of the
first shrink block, and one 1 x 1 convolution in place of the second shrink block and the last
stage. It has 4,937,962 parameters at 37 classes.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from .levit_deck import LevitDeck, create_levit_deck, deck_cfg

default_cfgs = generate_default_cfgs({"hovit": deck_cfg()})


@register_model
def hovit(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Stem, 2 blocks at 256, conv shrink, 2 blocks at 384, 1 x 1 conv to 512, mean, two heads."""
    args = {"depth": (2, 2, 1), "shrink": "conv", "conv_stages": (2,)}
    return create_levit_deck("hovit", pretrained, **args | kwargs)
