"""The models, registered with timm: importing this package is what makes
`timm.create_model("hovit")` work. Nothing here knows of data, training or configuration."""

from . import (
    attention_layer,
    deployed,
    efficientvit,
    hovit,
    launcher,
    levit_deck,
    mhsa_share,
    skipvit,
    swin,
)

__all__ = [
    "attention_layer",
    "deployed",
    "efficientvit",
    "hovit",
    "launcher",
    "levit_deck",
    "mhsa_share",
    "skipvit",
    "swin",
]
