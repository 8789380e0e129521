"""The models. Importing this package registers them with timm, for `timm.create_model("hovit")`.

README.md in this folder has the model cards: source, input, size, accuracy, weights and limits.
Nothing here depends on data, training or configuration.
"""

from . import (
    attention_layer,
    deployed,
    efficientvit,
    front,
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
    "front",
    "hovit",
    "launcher",
    "levit_deck",
    "mhsa_share",
    "skipvit",
    "swin",
]
