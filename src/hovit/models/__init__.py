"""The models, registered with timm: importing this package is what makes
`timm.create_model("hovit")` work. Nothing here knows of data, training or configuration."""

from . import hovit, launcher, levit_deck, swin

__all__ = ["hovit", "launcher", "levit_deck", "swin"]
