"""The Launcher: a pretrained ResNet50 that paints the image which a backbone then classifies.

Seed: the HoViT slide deck (seeds/000), slides "03 Launcher Architecture". ResNet50 is timm's.

ResNet50 without its classifier -> one pooled vector of 2,048 -> Linear to a 3 x 56 x 56 image ->
ConvTranspose2d (4 x 4, stride 4) -> 3 x 224 x 224 -> the whole backbone, stem included. The image
is a linear function of one vector: whatever the backbone reads, ResNet50 had to say in 2,048
numbers. All of it is trained. It adds 42,785,171 parameters at 224 pixels.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from . import hovit, levit_deck

RESNET_FEATURES = 2048
BACKBONES = (*levit_deck.default_cfgs, *hovit.default_cfgs, "levit_256")

default_cfgs = generate_default_cfgs(
    {
        f"l_{name}": levit_deck.deck_cfg(
            fixed_input_size=True, first_conv="resnet.conv1", classifier="backbone.head.linear"
        )
        for name in BACKBONES
    }
)


class Launcher(nn.Module):
    """A backbone behind ResNet50 and the image that it paints.

    Args:
        backbone: name of a timm model.
        img_size: height and width of the painted image in pixels, multiples of 4 (224 in the deck;
            smaller is ours, so that small scales stay small). The input itself may have any size.
        num_classes: outputs of the backbone.

    Raises:
        ValueError: for an `img_size` that 4 does not divide.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        height, width = to_2tuple(img_size)
        if height % 4 or width % 4:
            raise ValueError(f"img_size={img_size}: the Launcher paints multiples of 4 pixels")
        self.painted = (3, height // 4, width // 4)
        self.resnet: Any = timm.create_model("resnet50", num_classes=0)
        self.to_image = nn.Linear(RESNET_FEATURES, math.prod(self.painted))
        self.upsample = nn.ConvTranspose2d(3, 3, kernel_size=4, stride=4)
        if timm.get_pretrained_cfg_value(backbone, "fixed_input_size"):
            kwargs["img_size"] = img_size
        self.backbone: Any = timm.create_model(backbone, num_classes=num_classes, **kwargs)
        self.num_features = self.head_hidden_size = self.backbone.num_features

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The backbone's classifier."""
        return self.backbone.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifier for the backbone; ResNet50 has none."""
        self.backbone.reset_classifier(num_classes, global_pool)

    def set_distilled_training(self, enable: bool = True) -> None:
        """With `enable`, training gives both of the backbone's heads."""
        self.backbone.set_distilled_training(enable)

    def paint(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> the image that the backbone sees, [B, 3, img_size, img_size]."""
        x = self.to_image(self.resnet(x))  # [B, 2048] -> [B, 3 * 56 * 56]
        return self.upsample(x.unflatten(1, self.painted))

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> the backbone's features."""
        return self.backbone.forward_features(self.paint(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The backbone's features -> [B, classes]."""
        return self.backbone.forward_head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(x))


def _launcher_before(backbone: str) -> Callable[..., Launcher]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> Launcher:
        build = partial(Launcher, backbone)
        return build_model_with_cfg(build, f"l_{backbone}", pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = f"l_{backbone}"
    entrypoint.__doc__ = f"The Launcher before `{backbone}`."
    return entrypoint


for _name in BACKBONES:
    globals()[f"l_{_name}"] = register_model(_launcher_before(_name))
