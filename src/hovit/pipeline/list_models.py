"""List the models that studies may name, with their arguments, for `hovit.config.models`."""

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import timm
from torch import nn

import hovit.models  # noqa: F401 (registers)

from ..attention import modules
from ..attention.forms import ATTENTION_OPTIONS
from ..config.models import ANY, MODELS_FILE, OTHERS
from ..config.schema import TAKEN
from ..models.attention_layer import AttentionLayer
from ..models.efficientvit import EfficientViT
from ..models.efficientvit_layers import Switches
from ..models.front import ModelName
from ..models.levit_deck import LevitDeck
from ..models.swin import Swin
from ..utils.files import write_text

Kind = str | dict[str, Any]
Arguments = dict[str, list[Kind]]
ATTENTION = [
    each
    for each in vars(modules).values()
    if inspect.isclass(each) and each.__module__ == modules.__name__
]
# Classes to which classes of this project pass their remaining keyword arguments.
KEYWORDS: dict[Any, list[type]] = {
    AttentionLayer: ATTENTION, EfficientViT: [Switches], LevitDeck: ATTENTION, Swin: ATTENTION,
}  # fmt: skip
HIDDEN = TAKEN | {"cfg", "device", "dtype"}  # not for studies
BATCHNORM = {"bn_tf": False, "bn_momentum": 0.1, "bn_eps": 1e-5}  # of timm's EfficientNets


class _Built(Exception):
    """Raised instead of building a model; carries the class and the arguments."""


def write_models() -> None:
    """Write `MODELS_FILE`, with one entry per line."""
    blocks = []
    for name, entries in list_models().items():
        lines = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items())
        blocks.append(f'  "{name}": {{\n{lines}\n  }}')
    write_text(MODELS_FILE, "{\n" + ",\n".join(blocks) + "\n}\n")


def list_models() -> dict[str, dict[str, Any]]:
    """The registered models of timm and of this project.

    Returns:
        `arguments`: class -> argument -> alternative types; `models`: name -> class, or [class,
        name of the argument that selects the model for all other arguments]; `tags`: name -> tags
        of the pretrained weights, separated by spaces.
    """
    arguments: dict[str, Arguments] = {}
    models: dict[str, str | list[str]] = {}
    with _nothing_is_built():
        for name in timm.list_models():
            entry = timm.model_entrypoint(name)
            if entry.__module__.partition(".")[0] not in ("timm", "hovit"):
                continue  # registered by another package
            own = inspect.signature(entry, eval_str=True).parameters.values()
            delegate = [p.name for p in own if p.annotation == ModelName]
            key, found = (name, _of_signature(entry)[0]) if delegate else _of_class(name)
            arguments[key] = dict(sorted(found.items()))
            models[name] = [key, *delegate] if delegate else key
    tags: dict[str, list[str]] = {}
    for name, _, tag in (full.partition(".") for full in timm.list_pretrained()):
        if name in models and tag:
            tags.setdefault(name, []).append(tag)
    return {
        "arguments": dict(sorted(arguments.items())),
        "models": models,
        "tags": {name: " ".join(tags[name]) for name in sorted(tags)},
    }


@contextmanager
def _nothing_is_built() -> Iterator[None]:
    """Make entry points raise `_Built` instead of building the model."""

    def build(model_cls: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        raise _Built(model_cls, kwargs)

    name = "build_model_with_cfg"
    users = [m for m in list(sys.modules.values()) if name in getattr(m, "__dict__", {})]
    before = [getattr(module, name) for module in users]
    for module in users:
        setattr(module, name, build)
    try:
        yield
    finally:
        for module, function in zip(users, before, strict=True):
            setattr(module, name, function)


def _of_class(name: str) -> tuple[str, Arguments]:
    """A short name of the class that an entry point builds, and the arguments that it takes."""
    try:
        timm.model_entrypoint(name)(**BATCHNORM)
    except _Built as built:
        target, passed = built.args
    consumed: Arguments = {
        key: [_kind_of(value)] for key, value in BATCHNORM.items() if key not in passed
    }
    bound = ""
    cls = target
    if isinstance(target, partial):
        cls, bound = target.func, f"({target.args[0]})"
    key = f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}{bound}"
    return key + "+bn" * bool(consumed), consumed | _arguments(target)


def _arguments(target: Any) -> Arguments:
    """Argument -> alternative types of a class, of a function, or of a partial."""
    found, is_open = _of_signature(target)
    if not is_open:
        return found
    if isinstance(target, partial):  # the other arguments go to the named model
        return _of_class(target.args[0])[1] | found
    sources = [_of_signature(each)[0] for each in KEYWORDS.get(target, ())]
    if KEYWORDS.get(target) is ATTENTION:
        sources = [{k: v for k, v in s.items() if k in ATTENTION_OPTIONS} for s in sources]
    parent = next(c for c in target.__mro__[1:] if "__init__" in vars(c))
    overlay = _of_overlay(target)
    if parent is not nn.Module and issubclass(parent, nn.Module):
        sources.append(_arguments(parent))
    elif overlay:
        sources.append(overlay)
    elif not sources:
        sources.append({OTHERS: [ANY]})
    for source in sources:
        found = source | found
    return found


def _of_overlay(target: Any) -> Arguments:
    """Fields of timm's `cfg` dataclass, which keyword arguments replace; {} if it is nested."""
    cfg = inspect.signature(target, eval_str=True).parameters.get("cfg")
    if cfg is None or not is_dataclass(cfg.annotation):
        return {}
    if any(is_dataclass(field.type) for field in fields(cfg.annotation)):
        return {}
    return _of_signature(cfg.annotation)[0]


def _of_signature(target: Any) -> tuple[Arguments, bool]:
    """Arguments in the signature, and whether it takes other keyword arguments."""
    found: Arguments = {}
    is_open = False
    for parameter in inspect.signature(target, eval_str=True).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            is_open = True
        elif parameter.kind is not parameter.VAR_POSITIONAL and parameter.name not in HIDDEN:
            found[parameter.name] = _kinds(parameter)
    return found, is_open


def _kinds(parameter: inspect.Parameter) -> list[Kind]:
    """Alternative types of a parameter, from its annotation and its default value."""
    stated = [] if parameter.annotation is parameter.empty else _of_type(parameter.annotation)
    given = parameter.default
    if given is not parameter.empty and given is not None and not isinstance(given, type):
        kind = _kind_of(given)
        exact = any(isinstance(each, dict) or each == "model" for each in stated)
        stated += [kind] if kind and not exact else []
    unique = [kind for i, kind in enumerate(stated) if kind not in stated[:i]]
    return unique or [ANY]


def _kind_of(value: Any) -> str:
    """Type of a default value; `''` if YAML cannot state such a value."""
    if isinstance(value, tuple | list):
        kinds = {_kind_of(each) for each in value}
        return f"list of {kinds.pop()}" if len(kinds) == 1 and "" not in kinds else "list"
    name = type(value).__name__
    return name if name in ("bool", "int", "float", "str") else ""


def _of_type(annotation: Any) -> list[Kind]:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation == ModelName:
        return ["model"]
    if origin is Annotated:
        pattern, example = args[1:]
        return [{"one of": [""]}, {"pattern": pattern.pattern, "example": example}]
    if origin is Literal:
        return [{"one of": list(args)}]
    if origin in (Union, UnionType):
        return [kind for arg in args for kind in _of_type(arg)]
    if annotation in (bool, int, float, str):
        return [annotation.__name__]
    if origin in (tuple, list) or (origin and "Sequence" in str(origin)):
        inner = [k for arg in args if arg is not Ellipsis for k in _of_type(arg)]
        simple = [k for k in inner if k in ("bool", "int", "float", "str")]
        return [f"list of {k}" for k in simple] if simple and simple == inner else ["list"]
    if annotation is NoneType or annotation in (dict, list, tuple) or origin is dict:
        return []
    is_layer = annotation is Callable or origin is type or "Callable" in str(annotation)
    return ["str"] if is_layer else []  # timm takes layers by name
