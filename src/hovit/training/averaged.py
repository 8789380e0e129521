"""Averaged weights (EMA) and adaptive gradient clipping (AGC), both from timm."""

import torch
import torch.distributed
from timm.models import model_parameters
from timm.utils import ModelEmaV3
from timm.utils.agc import adaptive_clip_grad
from torch import nn


class AveragedWeights(ModelEmaV3):
    """Exponential moving average of parameters and buffers, with the same decay in every step.

    Its whole state is the averaged model, which a checkpoint holds.

    Args:
        model: the trained model, on its device.
        decay: weight of the previous average in each step.
    """

    def synchronise(self) -> None:
        """Copy the averaged buffers of the first process to all processes.

        Parameters are equal in all processes. BatchNorm statistics differ if each process
        normalises its own images (training on CPUs).
        """
        if torch.distributed.is_initialized():
            for buffer in self.module.buffers():
                torch.distributed.broadcast(buffer, 0)


def average_weights(model: nn.Module, decay: float | None) -> AveragedWeights | None:
    """Average that starts from the current weights; None if the recipe has no decay."""
    return AveragedWeights(model, decay) if decay else None


def clip_adaptively(model: nn.Module, factor: float) -> None:
    """Clip each output unit's gradient to `factor` times the norm of its weights.

    Brock et al., arXiv 2102.06171. As in timm's training, the last layer is not clipped.

    Args:
        model: the trained model, with unscaled gradients.
        factor: 0.02 in EfficientViT.
    """
    adaptive_clip_grad(list(model_parameters(model, exclude_head=True)), factor)
