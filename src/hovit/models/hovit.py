"""HoViT: the Highly shrunk and Optimized Vision Transformer.

Seed: the HoViT slide deck (seeds/000), slides "05 Conclusion". No paper and no code are published.

Three of the deck's ideas on its LeViT at once: two blocks a stage, convolutions for downsampling,
and one 1 x 1 convolution in place of the last shrink and stage. 4,937,962 parameters at 37 classes.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .levit_deck import LevitDeck, deck_cfg

default_cfgs = generate_default_cfgs({"hovit": deck_cfg()})


@register_model
def hovit(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Stem, 2 blocks at 256, conv shrink, 2 blocks at 384, 1 x 1 conv to 512, mean, two heads."""
    args = {"depths": (2, 2, 1), "shrink": "conv", "conv_stages": (2,)}
    return build_model_with_cfg(LevitDeck, "hovit", pretrained, **args | kwargs)
