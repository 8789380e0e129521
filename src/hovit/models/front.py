"""Pretrained networks in front of a backbone, and alone with a new classifier.

Paper: none; the Launcher of the HoViT deck puts ResNet50 in front. Any other network of timm is
our addition, for example EfficientNet-Lite0:
`EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks`
    - https://arxiv.org/abs/1905.11946
Upstream: the networks are timm's.

Models here take images that are normalised with ImageNet's mean and standard deviation, as all
models of this package do. `Renormalize` changes them to the statistics that a network was trained
with.
"""

from abc import abstractmethod
from typing import Annotated, Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

ModelName = Annotated[str, "a model of timm, with or without a tag"]

default_cfgs = generate_default_cfgs(
    {
        "front_linear": {
            "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7),
            "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
            "first_conv": "backbone.conv1", "classifier": "backbone.fc",  # those of ResNet50
        }
    }
)  # fmt: skip


class Renormalize(nn.Module):
    """From ImageNet's mean and standard deviation to those of other weights.

    Args:
        mean, std: of each channel, for values in 0..1.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        old_mean, old_std = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])
        new_mean, new_std = torch.tensor([mean, std])
        self.register_buffer("scale", (old_std / new_std).view(-1, 1, 1), persistent=False)
        shift = ((old_mean - new_mean) / new_std).view(-1, 1, 1)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift  # [B, 3, H, W]


def make_renormalize(front: ModelName, in_chans: int = 3) -> nn.Module:
    """Renormalization to the statistics of timm's weights of a network.

    Args:
        front: name of a timm model, with or without a tag.
        in_chans: channels of the images.

    Raises:
        ValueError: if the statistics differ from ImageNet's and the images do not have 3 channels.
    """
    cfg = timm.get_pretrained_cfg(front)
    if cfg is None or (cfg.mean, cfg.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
        return nn.Identity()
    if in_chans != len(cfg.mean):
        raise ValueError(f"in_chans={in_chans}: {front} has a mean for {len(cfg.mean)} channels")
    return Renormalize(cfg.mean, cfg.std)


class Fronted(nn.Module):
    """Base class of models with a pretrained front.

    The front's pooled features, [B, F], can be computed once and given to `forward` in place of
    the images. timm's interface is that of the submodule `backbone`.
    """

    backbone: Any  # a Module, whose methods from timm are not typed

    @property
    @abstractmethod
    def front_module(self) -> Any:
        """The pretrained network."""

    @abstractmethod
    def front_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> pooled features of the front, [B, F]."""

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def num_features(self) -> int:
        return self.backbone.num_features

    @property
    def head_hidden_size(self) -> int:
        return self.backbone.head_hidden_size

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        return self.backbone.feature_info

    def no_weight_decay(self) -> set[str]:
        """Names of the backbone's parameters without weight decay."""
        own = getattr(self.backbone, "no_weight_decay", set)
        return {f"backbone.{name}" for name in own()}

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The classifier of the backbone."""
        return self.backbone.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier of the backbone."""
        args = () if global_pool is None else (global_pool,)
        self.backbone.reset_classifier(num_classes, *args)

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """Remove the stages of the backbone that are not needed; arguments as in timm."""
        return self.backbone.prune_intermediate_layers(*args, **kwargs)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Features of the backbone -> [B, classes]."""
        return self.backbone.forward_head(x, pre_logits=pre_logits)


class FrontLinear(Fronted):
    """A pretrained network with a linear classifier on its pooled features.

    Args:
        front: name of a timm model.
        num_classes: outputs.
        in_chans: channels of the images.
        device, dtype: of parameters and buffers.
        kwargs: arguments of the network.
    """

    def __init__(
        self,
        front: ModelName,
        num_classes: int = 1000,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.renormalize = make_renormalize(front, in_chans)
        self.backbone = timm.create_model(
            front, num_classes=num_classes, in_chans=in_chans, **kwargs
        )
        self.to(device=device, dtype=dtype)

    @property
    def front_module(self) -> Any:
        return self.backbone

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group the parameters by depth."""
        return within_backbone(self.backbone.group_matcher(coarse))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Features of chosen stages; arguments as in timm."""
        return self.backbone.forward_intermediates(self.renormalize(x), *args, **kwargs)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> the features of the network, not pooled."""
        return self.backbone.forward_features(self.renormalize(x))

    def front_features(self, x: Tensor) -> Tensor:
        return self.backbone.forward_head(self.forward_features(x), pre_logits=True)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W], or their pooled features [B, F] -> [B, classes]."""
        return self.backbone.get_classifier()(x if x.ndim == 2 else self.front_features(x))


def within_backbone(groups: dict[str, Any]) -> dict[str, Any]:
    """timm's patterns of parameter groups, for parameters of a submodule `backbone`."""

    def within(pattern: str) -> str:
        inner = pattern.removeprefix("^").replace("|^", "|")
        return rf"^backbone\.(?:{inner})"

    def each(patterns: Any) -> Any:
        if isinstance(patterns, str):
            return within(patterns)
        return [(within(pattern), order) for pattern, order in patterns]

    return {name: each(patterns) for name, patterns in groups.items()}


@register_model
def front_linear(
    pretrained: bool = False, front: ModelName = "resnet50", **kwargs: Any
) -> FrontLinear:
    """A network of timm with a new linear classifier; weights of the network are loaded later.

    Raises:
        RuntimeError: for `pretrained`, which exists for the network itself.
    """
    if pretrained:
        raise RuntimeError(f"pretrained: create {front!r} itself")
    return build_model_with_cfg(
        FrontLinear,
        "front_linear",
        pretrained,
        feature_cfg={"feature_cls": "getter"},
        front=front,
        **kwargs,
    )
