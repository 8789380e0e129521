"""EfficientViT under torchvision's RetinaNet.

Papers: EfficientViT, https://arxiv.org/abs/2305.07027 (Table 5); RetinaNet,
https://arxiv.org/abs/1708.02002; FPN, https://arxiv.org/abs/1612.03144
Upstream: https://github.com/microsoft/Cream/tree/main/EfficientViT/downstream (pyramid)
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
ANCHOR_SCALES = (
    1.0,
    2 ** (1 / 3),
    2 ** (2 / 3),
)  # three per octave; times 4 strides
PRETRAINED_SIZE = 224  # pixels; the attention windows of these weights are 7, 7 and 4
FULL_SIZE = 448  # pixels; the windows are 7 in all stages, as upstream


class Pyramid(FeaturePyramidNetwork):
    """Feature pyramid: stages at strides 16, 32, 64 -> five maps of `channels`, strides 8 to 128.

    As upstream, a 2 x 2 transposed convolution of stride 2 and a 3 x 3 convolution make the finest
    level, and stride-2 subsampling of the level before makes the coarsest.
    """

    def __init__(self, widths: list[int], channels: int) -> None:
        super().__init__(widths, channels)
        self.finer = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.finer_block = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.kaiming_uniform_(self.finer_block.weight, a=1)  # as in torchvision's FPN
        nn.init.zeros_(self.finer_block.bias)  # type: ignore[arg-type]

    def forward(self, x: list[Tensor]) -> OrderedDict[str, Tensor]:
        """Stages [B, C_i, H / 16 / 2^i, W / 16 / 2^i] -> five levels, finest first."""
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
    """Stem and stages of a backbone, followed by the feature pyramid.

    Args:
        body: backbone from `make_backbone`.
        channels: channels of the pyramid.
        frozen_norms: whether batch norms keep their statistics in training, as upstream does with
            those of pretrained weights, because batches are small.
    """

    def __init__(self, body: Any, channels: int = 256, frozen_norms: bool = False) -> None:
        super().__init__()
        self.frozen_norms = frozen_norms
        self.patch_embed, self.stages = body.patch_embed, body.stages
        self.fpn = Pyramid([info["num_chs"] for info in body.feature_info], channels)
        self.out_channels = channels  # RetinaNet reads it

    def train(self, mode: bool = True) -> "PyramidBackbone":
        """Set the mode of all modules; frozen batch norms stay in evaluation mode."""
        super().train(mode)
        for module in self.modules() if self.frozen_norms else ():
            if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):  # several GPUs synchronise it
                module.eval()
        return self

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Images [B, 3, H, W], H and W multiples of 128 -> five levels, finest first."""
        x = self.patch_embed(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)  # [B, C_i, H / 16 / 2^i, W / 16 / 2^i]
        return self.fpn(maps)


def anchors() -> AnchorGenerator:
    """Nine anchors per cell, as in RetinaNet: three sizes from 4 strides, at 1:2, 1:1 and 2:1."""
    sizes = tuple(tuple(4 * stride * scale for scale in ANCHOR_SCALES) for stride in STRIDES)
    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))


def make_backbone(name: str, image_size: int = FULL_SIZE, **args: Any) -> Any:
    """Create a registered backbone with three stages at strides 16, 32, 64, without classifier.

    Args:
        name: model name: `efficientvit_paper_m0` to `_m5`.
        image_size: sets the attention windows, in pixels.
        args: arguments of the model.

    Raises:
        HovitError: for an unknown model, or one with other strides.
    """
    body = create_model(name, num_classes=0, image_size=image_size, **args)
    strides = [info["reduction"] for info in getattr(body, "feature_info", [])]
    if strides != [16, 32, 64] or not hasattr(body, "stages"):
        raise HovitError(
            f"backbone {name}: stages at strides {strides}, detection needs 16, 32, 64"
        )
    return body


def retinanet(
    body: Any,
    num_classes: int,
    short_side: int = 800,
    long_side: int = 1333,
    channels: int = 256,
    frozen_norms: bool = False,
) -> RetinaNet:
    """torchvision's RetinaNet on a backbone from `make_backbone`, with focal and L1 loss.

    In training, images [3, H, W] (floats in 0..1) and boxes (left top right bottom, pixels) give
    the losses. In evaluation, each image gives up to 100 boxes, labels and scores. Batches are
    padded to multiples of 128 pixels so that each level has twice the size of the next; upstream
    pads to multiples of 32.

    Args:
        body: backbone.
        num_classes: object classes; labels are 0 to num_classes - 1.
        short_side: length of the shorter side after resizing, in pixels.
        long_side: maximum length of the longer side, in pixels.
        channels: channels of the pyramid and the heads.
        frozen_norms: whether the batch norms of the backbone keep their statistics in training.
    """
    return RetinaNet(
        PyramidBackbone(body, channels, frozen_norms),
        num_classes,
        min_size=short_side,
        max_size=long_side,
        size_divisible=STRIDES[-1],
        anchor_generator=anchors(),
        detections_per_img=100,  # the maximum in COCO's evaluation
    )


def count_macs(model: RetinaNet, height: int, width: int) -> int:
    """Multiply-adds of convolutions and matrix products for one padded image.

    Counts on the meta device and leaves the model there, without weights.
    """
    model = model.to("meta").eval()
    sides = (-(-n // STRIDES[-1]) * STRIDES[-1] for n in (height, width))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        levels = model.backbone(torch.empty(1, 3, *sides, device="meta"))
        model.head(list(levels.values()))
    return counter.get_total_flops() // 2
