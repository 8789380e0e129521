"""The Launcher: a pretrained network that generates the image that a backbone classifies.

Paper: none; the HoViT deck, "03 Launcher Architecture". ResNet50:
`Deep Residual Learning for Image Recognition`
    - https://arxiv.org/abs/1512.03385
Upstream: none is published for the Launcher; ResNet50 is timm's (timm/models/resnet.py).

ResNet50 without its classifier -> one pooled vector of 2,048 -> Linear to a 3 x 56 x 56 image ->
ConvTranspose2d (4 x 4, stride 4) -> 3 x 224 x 224 -> the whole backbone, including its stem. The
generated image is a linear function of the pooled vector, so the backbone gets no more information
than these 2,048 numbers. All parts are trained. The Launcher adds 42,785,171 parameters at 224
pixels. Any front other than ResNet50 is our addition (`front`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from . import hovit, levit_deck
from .build import build_model
from .front import Fronted, ModelName, make_renormalize, within_backbone

IMAGE_CHANNELS = 3  # of the generated image, whatever the channels of the input
BACKBONES = (*levit_deck.default_cfgs, *hovit.default_cfgs, "levit_256")

default_cfgs = generate_default_cfgs(
    {
        f"l_{name}": levit_deck.deck_cfg(
            fixed_input_size=True,
            first_conv="resnet.conv1",
            classifier=("backbone.head.linear", "backbone.head_dist.linear"),
        )
        for name in BACKBONES
    }
)


class Launcher(Fronted):
    """A pretrained network, an image generator and a backbone.

    Args:
        backbone: name of a timm model.
        front: name of the timm model in front, ResNet50 in the deck. It gets images with the mean
            and standard deviation of its own weights.
        num_classes: outputs of the backbone.
        img_size: height and width of the generated image in pixels, multiples of 4 (224 in the
            deck; smaller sizes are our addition, for small scales). The input can have any size.
        in_chans: channels of the input. The generated image always has 3.
        device, dtype: of parameters and buffers.
        kwargs: arguments of the backbone.

    Raises:
        ValueError: if `img_size` is not a multiple of 4, or the front cannot take `in_chans`.
    """

    def __init__(
        self,
        backbone: str,
        front: ModelName = "resnet50",
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        height, width = to_2tuple(img_size)
        if height % 4 or width % 4:
            raise ValueError(f"img_size={img_size}: the Launcher needs multiples of 4 pixels")
        self.in_chans = in_chans
        self.low_res_shape = (IMAGE_CHANNELS, height // 4, width // 4)
        self.renormalize = make_renormalize(front, in_chans)
        # The name `resnet` is in the state dicts of earlier runs.
        self.front_name = "resnet" if front == "resnet50" else "front"
        net: Any = timm.create_model(front, num_classes=0, in_chans=in_chans)
        self.add_module(self.front_name, net)
        self.to_image = nn.Linear(net.head_hidden_size, math.prod(self.low_res_shape))
        self.upsample = nn.ConvTranspose2d(IMAGE_CHANNELS, IMAGE_CHANNELS, kernel_size=4, stride=4)
        if timm.get_pretrained_cfg_value(backbone, "fixed_input_size"):
            kwargs["img_size"] = img_size
        self.backbone = timm.create_model(backbone, num_classes=num_classes, **kwargs)
        self.to(device=device, dtype=dtype)

    @property
    def front_module(self) -> Any:
        return self.get_submodule(self.front_name)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group the parameters by depth: front and generator come first."""
        groups = within_backbone(self.backbone.group_matcher(coarse))
        stem = rf"^(?:{self.front_name}|to_image|upsample)\.|{groups['stem']}"
        return {"stem": stem, "blocks": groups["blocks"]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, in the front and in the backbone."""
        self.front_module.set_grad_checkpointing(enable)
        self.backbone.set_grad_checkpointing(enable)

    def set_distilled_training(self, enable: bool = True) -> None:
        """With `enable`, a forward pass in training mode returns the logits of both heads."""
        self.backbone.set_distilled_training(enable)

    def generate_image(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W], or features [B, F] -> [B, 3, img_size, img_size]."""
        x = x if x.ndim == 2 else self.front_features(x)
        x = self.to_image(x)  # [B, 2048] -> [B, 3 * 56 * 56]
        return self.upsample(x.unflatten(1, self.low_res_shape))

    def front_features(self, x: Tensor) -> Tensor:
        return self.front_module(self.renormalize(x))

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Features of chosen stages of the backbone; arguments as in timm."""
        return self.backbone.forward_intermediates(self.generate_image(x), *args, **kwargs)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> the features of the backbone."""
        return self.backbone.forward_features(self.generate_image(x))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images [B, in_chans, H, W], or pooled features [B, F] of the front -> [B, classes]."""
        return self.forward_head(self.forward_features(x))


def _register_launcher(backbone: str) -> Callable[..., Launcher]:
    """Register `l_{backbone}`: the Launcher in front of this backbone."""

    def create_launcher(pretrained: bool = False, **kwargs: Any) -> Launcher:
        return build_model(
            partial(Launcher, backbone),
            f"l_{backbone}",
            pretrained,
            feature_cfg={"out_indices": (0, 1, 2), "feature_cls": "getter"},
            **kwargs,
        )

    create_launcher.__name__ = create_launcher.__qualname__ = f"l_{backbone}"
    create_launcher.__doc__ = f"The Launcher in front of `{backbone}`."
    return register_model(create_launcher)


for _name in BACKBONES:
    globals()[f"l_{_name}"] = _register_launcher(_name)
