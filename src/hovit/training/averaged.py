"""Averaged weights (EMA) and adaptive gradient clipping (AGC), both by timm."""

import torch
import torch.distributed
from timm.models import model_parameters
from timm.utils import ModelEmaV3
from timm.utils.agc import adaptive_clip_grad
from torch import nn


class AveragedWeights(ModelEmaV3):
    """Exponential moving average of parameters and buffers, with the same decay in every step.

    A checkpoint holds all of its state: the averaged model.

    Args:
        model: the trained model, on its device.
        decay: share of the average that each step keeps.
    """

    def synchronise(self) -> None:
        """Give all processes the average of the first one.

        Parameters are equal in all of them. BatchNorm statistics are not, where each process
        normalises its own images (training on CPUs).
        """
        if torch.distributed.is_initialized():
            for buffer in self.module.buffers():
                torch.distributed.broadcast(buffer, 0)


def average_weights(model: nn.Module, decay: float | None) -> AveragedWeights | None:
    """The average that a recipe asks for, starting from the present weights."""
    return AveragedWeights(model, decay) if decay else None


def clip_adaptively(model: nn.Module, factor: float) -> None:
    """Clip each output unit's gradient to `factor` times the norm of its weights.

    Brock et al., arXiv 2102.06171. As in timm's training, the last layer is not clipped.

    Args:
        model: the trained model, with gradients that are not scaled.
        factor: 0.02 in EfficientViT.
    """
    adaptive_clip_grad(list(model_parameters(model, exclude_head=True)), factor)
