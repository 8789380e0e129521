"""A model in its deploy form, registered so that it is measured like any other model.

    timm.create_model("deployed", of="efficientvit_paper_m0")
    timm.create_model("deployed", of="efficientvit_m0", by="timm", channels_last=True)

Paper: `LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference`
    - https://arxiv.org/abs/2104.01136
`EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention`
    - https://arxiv.org/abs/2305.07027
Both time models with BatchNorm folded.
Upstream: `reparameterize_model` is timm's (timm/utils/model.py).
"""

from collections.abc import Callable
from typing import Any, Literal

import timm
import torch
from timm.models import generate_default_cfgs, register_model
from timm.utils.model import reparameterize_model
from torch import nn

from .deploy import deploy
from .front import ModelName

DEPLOY_FUNCTIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "hovit": deploy,
    "folding": lambda model: deploy(model, parts=False),
    "timm": reparameterize_model,
    "nothing": lambda model: model,
}

default_cfgs = generate_default_cfgs({"deployed": {"num_classes": 1000}})


@register_model
def deployed(
    pretrained: bool = False,
    of: ModelName = "",
    by: Literal["hovit", "folding", "timm", "nothing"] = "hovit",
    channels_last: bool | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Create a model and convert it for inference; random weights are enough to measure time.

    Args:
        pretrained: load pretrained weights of the model.
        of: name of the model.
        by: `'hovit'`: `hovit.models.deploy`; `'folding'`: the same without EfficientViT's parts;
            `'timm'`: timm's own fusion; `'nothing'`: no change.
        channels_last: memory format of the weights, and thereby of the feature maps. None keeps
            the format (`hovit` and `folding` produce channels-last).
        kwargs: arguments of the model.

    Returns:
        the converted model in evaluation mode.

    Raises:
        ValueError: for a missing `of`, an unknown `by` or format, or a BatchNorm that cannot be
            folded.
        RuntimeError: for `features_only`, which a converted model does not support.
    """
    if not of:
        raise ValueError("of='': name the model to deploy")
    if by not in DEPLOY_FUNCTIONS:
        raise ValueError(f"by={by!r}: one of {', '.join(map(repr, DEPLOY_FUNCTIONS))}")
    if channels_last not in (True, False, None):
        raise ValueError(f"channels_last={channels_last!r}: true, false or left out")
    if kwargs.get("features_only"):
        raise RuntimeError("features_only not implemented for deployed models.")
    kwargs = {key: value for key, value in kwargs.items() if not key.startswith("pretrained_cfg")}
    kwargs.pop("cache_dir", None)
    model = DEPLOY_FUNCTIONS[by](timm.create_model(of, pretrained=pretrained, **kwargs).eval())
    if channels_last is None:
        return model
    return model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
