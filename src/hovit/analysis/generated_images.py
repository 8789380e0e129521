"""The image that the Launcher generates from the pooled features of its front.

Source: the Launcher of the HoViT deck, "03 Launcher Architecture", which does not show this image.
The pictures are our addition.
"""

from base64 import b64encode
from typing import Any

import torch
from torch import Tensor

LEVELS = 255


def generated_images(model: Any, images: Tensor) -> dict[str, Any]:
    """Images that a Launcher generates, as the small images that its upsampling enlarges.

    The transposed convolution has stride = kernel size, so each of its blocks depends on one pixel
    of the small image. `upsample` of `hovit.report.figures.launcher_figures` repeats it from the
    record.

    Args:
        model: a Launcher.
        images: [B, 3, H, W], normalised.

    Returns:
        `small_images`: for each image, the bytes of uint8 [3, h, w] in base64, between `low` and
        `high`. `shape`: [3, h, w]. `kernel`: [3, 3, s, s], from and to channels. `bias`: [3].
        `varying`: variance over the images, averaged over the pixels of the generated image, in
        percent of the variance over images and pixels (within each channel).

    Raises:
        ValueError: if the model is not a Launcher.
    """
    if not hasattr(model, "generate_image"):
        raise ValueError("this model has no Launcher that generates an image")
    captured: list[Tensor] = []
    hook = model.upsample.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    try:
        with torch.inference_mode():
            generated = model.eval().generate_image(images).float()  # [B, 3, H, W]
    finally:
        hook.remove()
    small = captured[0].float()  # [B, 3, h, w]
    low, high = float(small.min()), float(small.max())
    levels = ((small - low) / max(high - low, 1e-12) * LEVELS).round().to(torch.uint8).cpu()
    between = generated.var(0, correction=0).mean()
    total = generated.transpose(0, 1).flatten(1).var(1, correction=0).mean()
    return {
        "small_images": [b64encode(each.numpy().tobytes()).decode() for each in levels],
        "shape": list(small.shape[1:]),
        "low": low,
        "high": high,
        "kernel": _rounded(model.upsample.weight),
        "bias": _rounded(model.upsample.bias),
        "varying": round(100 * float(between / total.clamp(min=1e-12)), 3),
    }


def _rounded(x: Tensor) -> Any:
    """A nested list of numbers with six decimals."""
    return (x.detach().double().cpu() * 1e6).round().div(1e6).tolist()
