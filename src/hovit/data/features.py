"""Pooled features of a frozen front, computed once for all images of a pack."""

from typing import Any

import numpy as np
import torch

from .loader import PackedImages, eval_batches, make_loader, to_input

BATCH = 32


class FrontFeatures:
    """Features of all images, kept on the device of the model, for `make_loader`.

    Args:
        model: a model with `front_features`, as in `hovit.models.front`.
        images: images of the pack.
        image_size: input size of the model in pixels.
        device: device of the model.
    """

    on_device = True

    def __init__(
        self, model: Any, images: PackedImages, image_size: int, device: torch.device
    ) -> None:
        batches = eval_batches(np.arange(len(images)), BATCH)
        training = model.training
        model.eval()
        found = []
        with torch.no_grad():
            for batch, _ in make_loader(images, batches, device):
                x = to_input(batch.to(device), image_size)
                found.append(model.front_features(x).float())
        model.train(training)
        self.images = torch.cat(found)  # [N, F]
        self.labels = images.labels.to(device)
