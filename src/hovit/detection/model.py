"""EfficientViT under torchvision's RetinaNet.

Papers: EfficientViT, https://arxiv.org/abs/2305.07027 (Table 5); RetinaNet,
https://arxiv.org/abs/1708.02002; FPN, https://arxiv.org/abs/1612.03144
Upstream: https://github.com/microsoft/Cream/tree/main/EfficientViT/downstream (the pyramid's shape)
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

from ..utils.create_model import create_model
from ..utils.errors import HovitError

STRIDES = (8, 16, 32, 64, 128)  # pixels per cell of the five levels
ANCHOR_SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))  # RetinaNet's three a octave, times 4 strides
PRETRAINED_AT = 224  # pixels: sets the attention windows, as in the weights to start from


class Pyramid(FeaturePyramidNetwork):
    """Stages at strides 16, 32, 64 -> five maps of `channels` at strides 8 to 128.

    A 2 x 2 transposed convolution of stride 2 doubles the finest merged map, and has a 3 x 3
    convolution of its own; the coarsest is every other cell of the one before. Both as upstream.
    """

    def __init__(self, widths: list[int], channels: int) -> None:
        super().__init__(widths, channels)
        self.finer = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.finer_block = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.kaiming_uniform_(self.finer_block.weight, a=1)  # as torchvision its own
        nn.init.zeros_(self.finer_block.bias)  # type: ignore[arg-type]

    def forward(self, x: list[Tensor]) -> OrderedDict[str, Tensor]:
        """[B, C_i, H / 16 / 2^i, W / 16 / 2^i] of each stage -> the five levels, finest first."""
        merged = self.get_result_from_inner_blocks(x[-1], -1)
        levels = [self.get_result_from_layer_blocks(merged, -1)]
        for i in reversed(range(len(x) - 1)):
            lateral = self.get_result_from_inner_blocks(x[i], i)
            merged = lateral + F.interpolate(merged, lateral.shape[-2:], mode="nearest")
            levels.insert(0, self.get_result_from_layer_blocks(merged, i))
        levels.insert(0, self.finer_block(self.finer(merged)))  # [B, channels, H / 8, W / 8]
        levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        return OrderedDict((str(i), level) for i, level in enumerate(levels))


class PyramidBackbone(nn.Module):
    """The backbone's stem and stages, without its classifier, and the pyramid on them."""

    def __init__(self, body: Any, channels: int = 256) -> None:
        super().__init__()
        self.patch_embed, self.stages = body.patch_embed, body.stages
        self.fpn = Pyramid([info["num_chs"] for info in body.feature_info], channels)
        self.out_channels = channels  # RetinaNet asks for it

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:  # [B, 3, H, W], sides in 128s
        x = self.patch_embed(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)  # [B, C_i, H / 16 / 2^i, W / 16 / 2^i]
        return self.fpn(maps)


def anchors() -> AnchorGenerator:
    """RetinaNet's nine a cell: three sizes from 4 strides on, at 1:2, 1:1 and 2:1."""
    sizes = tuple(tuple(4 * stride * scale for scale in ANCHOR_SCALES) for stride in STRIDES)
    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))


def make_backbone(name: str, **args: Any) -> Any:
    """A registered backbone of three stages at strides 16, 32, 64, without classifier.

    Args:
        name: of EfficientViT's form (`efficientvit_paper_m0` to `_m5`).
        args: the backbone's own.

    Raises:
        HovitError: for an unknown backbone, or one of another form.
    """
    body = create_model(name, num_classes=0, image_size=PRETRAINED_AT, **args)
    strides = [info["reduction"] for info in getattr(body, "feature_info", [])]
    if strides != [16, 32, 64] or not hasattr(body, "stages"):
        raise HovitError(
            f"backbone {name}: stages at strides {strides}, detection needs 16, 32, 64"
        )
    return body


def retinanet(
    body: Any, num_classes: int, short_side: int = 800, long_side: int = 1333, channels: int = 256
) -> RetinaNet:
    """RetinaNet on a backbone of `make_backbone`; focal and L1 loss, as torchvision has them.

    In training [3, H, W] floats in 0..1 and their boxes (pixels, left top right bottom) give the
    losses; in evaluation each image gives at most 100 boxes, labels and scores. Batches are padded
    to multiples of 128 pixels (ours; upstream's are of 32), so that every level doubles the next.

    Args:
        num_classes: of objects; labels are 0 to num_classes - 1.
        short_side, long_side: pixels that the shorter side is resized to, and the longer's bound.
        channels: of the pyramid and the heads.
    """
    return RetinaNet(
        PyramidBackbone(body, channels),
        num_classes,
        min_size=short_side,
        max_size=long_side,
        size_divisible=STRIDES[-1],
        anchor_generator=anchors(),
        detections_per_img=100,  # as many as COCO's evaluation looks at
    )


def count_macs(model: RetinaNet, height: int, width: int) -> int:
    """Multiply-adds of the convolutions and matrix products for one image, padded; nothing runs.

    The model is left on the meta device: its weights are gone.
    """
    model = model.to("meta").eval()
    sides = (-(-n // STRIDES[-1]) * STRIDES[-1] for n in (height, width))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        levels = model.backbone(torch.empty(1, 3, *sides, device="meta"))
        model.head(list(levels.values()))
    return counter.get_total_flops() // 2
