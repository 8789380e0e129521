"""A model as it is timed, as a rule with BatchNorm folded. Random weights do for a time.

    timm.create_model("deployed", of="efficientvit_paper_m0")
    timm.create_model("deployed", of="efficientvit_m0", by="timm", channels_last=True)

Papers: LeViT (https://arxiv.org/abs/2104.01136) and EfficientViT (https://arxiv.org/abs/2305.07027)
time their models so.
"""

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models import generate_default_cfgs, register_model
from timm.utils.model import reparameterize_model
from torch import nn

from .deploy import deploy

FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "hovit": deploy,
    "folding": lambda model: deploy(model, parts=False),
    "timm": reparameterize_model,
    "nothing": lambda model: model,
}

default_cfgs = generate_default_cfgs({"deployed": {"num_classes": 1000}})


@register_model
def deployed(
    pretrained: bool = False,
    of: str = "",
    by: str = "hovit",
    channels_last: bool | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A form of a model, the deploy form unless told, in evaluation mode.

    Args:
        pretrained: of the model.
        of: its name.
        by: `'hovit'`: `hovit.models.deploy`; `'folding'`: likewise, but EfficientViT's parts stay
            as they are; `'timm'`: what timm fuses by itself; `'nothing'`: the model as it is.
        channels_last: the order of the weights, which that of the maps follows; None: as it comes
            (of ours, channels-last).
        kwargs: the model's.

    Raises:
        ValueError: for another `by` or order, or a BatchNorm that cannot be folded.
    """
    if by not in FORMS:
        raise ValueError(f"by={by!r}: one of {', '.join(map(repr, FORMS))}")
    if channels_last not in (True, False, None):
        raise ValueError(f"channels_last={channels_last!r}: true, false or left out")
    known = {key: value for key, value in kwargs.items() if not key.startswith("pretrained_cfg")}
    known.pop("cache_dir", None)
    model = timm.create_model(of, pretrained=pretrained, **known).eval()
    made = FORMS[by](model)
    if channels_last is None:
        return made
    order = torch.channels_last if channels_last else torch.contiguous_format
    return made.to(memory_format=order)
