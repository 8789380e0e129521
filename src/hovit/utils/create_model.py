"""Models by name, at any image size: the one door to timm's registry that training and measuring
use."""

from typing import Any

import timm

from .errors import HovitError, one_line


def create_model(name: str, num_classes: int, image_size: int | None, **args: Any) -> Any:
    """`timm.create_model` without weights, telling the size to models whose shape depends on it.

    Gives a Module; `Any`, because the methods that timm adds are not typed.

    Args:
        name: a registered model; a `.tag` is refused, as weights are loaded elsewhere.
        num_classes: outputs.
        image_size: pixels a side; None for what takes no images.
        args: the model's own.

    Raises:
        HovitError: for an unknown name, or arguments that the model does not take.
    """
    if "." in name:
        raise HovitError(f"model {name!r}: a tag names weights; say `pretrained` instead")
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name[:6]}*")[:5])
        raise HovitError(
            f"model {name!r} is not registered with timm" + f"; near it: {near}" * bool(near)
        )
    if timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        args["img_size"] = image_size
    try:
        return timm.create_model(name, num_classes=num_classes, **args)
    except Exception as error:  # models make of wrong arguments what they will
        what = f"model {name} at {image_size} px with {args}"
        raise HovitError(f"{what}: {one_line(error)}") from None
