"""A model as it is timed: BatchNorm folded, by us or by timm. Random weights do for a time.

    timm.create_model("deployed", of="efficientvit_paper_m0")
    timm.create_model("deployed", of="efficientvit_m0", by="timm")

Papers: LeViT (https://arxiv.org/abs/2104.01136) and EfficientViT (https://arxiv.org/abs/2305.07027)
time their models so.
"""

from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from timm.utils.model import reparameterize_model
from torch import nn

from .deploy import deploy

default_cfgs = generate_default_cfgs({"deployed": {"num_classes": 1000}})


@register_model
def deployed(pretrained: bool = False, of: str = "", by: str = "hovit", **kwargs: Any) -> nn.Module:
    """The deploy form of a model, in evaluation mode.

    Args:
        pretrained: of the model.
        of: its name.
        by: `'hovit'`: `hovit.models.deploy`; `'timm'`: what timm fuses by itself.
        kwargs: the model's.

    Raises:
        ValueError: for another `by`, or a BatchNorm that cannot be folded.
    """
    if by not in ("hovit", "timm"):
        raise ValueError(f"by={by!r}: 'hovit' or 'timm'")
    known = {key: value for key, value in kwargs.items() if not key.startswith("pretrained_cfg")}
    known.pop("cache_dir", None)
    model = timm.create_model(of, pretrained=pretrained, **known).eval()
    return deploy(model) if by == "hovit" else reparameterize_model(model)
