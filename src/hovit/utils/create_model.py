"""Create registered models at any image size."""

from typing import Any

import timm

from .errors import HovitError, one_line


def create_model(name: str, num_classes: int, image_size: int | None, **args: Any) -> Any:
    """Call `timm.create_model` without weights, with `img_size` for models that depend on it.

    Returns a Module, typed `Any` because the methods that timm adds are not typed.

    Args:
        name: a registered model, without a `.tag`: weights are loaded elsewhere.
        num_classes: outputs.
        image_size: pixels per side; None for modules that take no images.
        args: further arguments of the model.

    Raises:
        HovitError: for an unknown name, or arguments that the model does not accept.
    """
    if "." in name:
        raise HovitError(f"model {name!r}: a tag names weights; use `pretrained` instead")
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name[:6]}*")[:5])
        raise HovitError(
            f"model {name!r} is not registered with timm" + f"; nearest: {near}" * bool(near)
        )
    if timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        args["img_size"] = image_size
    try:
        return timm.create_model(name, num_classes=num_classes, **args)
    except Exception as error:  # models raise many types for wrong arguments
        what = f"model {name} at {image_size} px with {args}"
        raise HovitError(f"{what}: {one_line(error)}") from None
