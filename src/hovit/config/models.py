"""Names and arguments of the models that studies may name, checked without importing torch.

`hovit schema` writes the list, `models.json`, from timm's registry (`hovit.pipeline.list_models`).
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..utils.errors import HovitError, nearest

MODELS_FILE = Path(__file__).with_name("models.json")
ANY, OTHERS = "any", "*"  # a type that is not checked; arguments that are not listed
TYPES = {"bool": bool, "int": int, "float": float, "str": str}


@cache
def _listed() -> dict[str, dict[str, Any]]:
    return json.loads(MODELS_FILE.read_text(encoding="utf-8"))


def check_model(name: str, where: str, tag: bool = False) -> None:
    """Check that a model exists.

    Args:
        name: name of the model.
        where: file and key, for the message.
        tag: whether the name may end in `.TAG`, the pretrained weights.

    Raises:
        HovitError: if timm has no such model, or no weights of this tag.
    """
    base, dot, given = name.partition(".")
    models = _listed()["models"]
    if dot and not tag:
        raise HovitError(f"{where}: {name!r}: a tag names weights, not a model; write {base!r}")
    if base not in models:
        raise HovitError(
            f"{where}: no model {base!r}{nearest(base, models)}; run `hovit schema` after adding it"
        )
    if dot:
        check_tag(base, given, where)


def check_tag(name: str, tag: str, where: str) -> None:
    """Check that timm has pretrained weights of a model under this tag.

    Raises:
        HovitError: if it has none.
    """
    tags = _listed()["tags"].get(name, "").split()
    if tag not in tags:
        known = f"it has {', '.join(tags)}" if tags else "it has none"
        raise HovitError(f"{where}: timm's {name} has no weights {tag!r}; {known}")


def check_arguments(name: str, args: dict[str, Any], where: str) -> None:
    """Check names and types of a model's arguments.

    Args:
        name: name of the model; it exists.
        args: argument -> value.
        where: file and key of the arguments, for the message.

    Raises:
        HovitError: if the model does not take an argument, or a value has another type.
    """
    listed = _listed()
    entry = listed["models"][name]
    key, delegate = (entry, None) if isinstance(entry, str) else entry
    known = listed["arguments"][key]
    if delegate is None:
        check_values(args, known, where, name)
        return
    check_values({k: v for k, v in args.items() if k in known}, known, where, name)
    if rest := {k: v for k, v in args.items() if k not in known}:
        target = str(args.get(delegate, "")).partition(".")[0]
        if target not in listed["models"]:
            near = nearest(next(iter(rest)), known)
            raise HovitError(f"{where}.{next(iter(rest))}: {name} without {delegate}{near}")
        check_arguments(target, rest, where)


def check_values(
    args: dict[str, Any], known: Mapping[str, list[Any]], where: str, taker: str
) -> None:
    """Check names and types of arguments.

    Args:
        args: argument -> value.
        known: argument -> alternative types; with `OTHERS` any further argument is accepted.
        where: file and key of the arguments, for the message.
        taker: name of the model or analysis, for the message.

    Raises:
        HovitError: for an unknown argument, or a value of another type.
    """
    for argument, value in args.items():
        if argument in known:
            _check_value(value, known[argument], f"{where}.{argument}")
        elif OTHERS not in known:
            near = nearest(argument, known) or f"; it takes {', '.join(known) or 'none'}"
            raise HovitError(f"{where}.{argument}: {taker} takes no such argument{near}")


def _check_value(value: Any, kinds: list[Any], where: str) -> None:
    """Check that a value has one of these types."""
    if kinds == ["model"] and isinstance(value, str):
        check_model(value, where, tag=True)
    elif not any(_fits(value, kind) for kind in kinds):
        choices = [c for k in kinds if isinstance(k, dict) for c in k.get("one of", ())]
        raise HovitError(f"{where}: {_wanted(kinds)}, not {value!r}{nearest(value, choices)}")


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, dict):
        if "one of" in kind:
            return any(type(value) is type(each) and value == each for each in kind["one of"])
        return isinstance(value, str) and re.fullmatch(kind["pattern"], value, re.ASCII) is not None
    if kind == ANY:
        return True
    if kind.startswith("list"):
        item = kind.removeprefix("list").removeprefix(" of ") or ANY
        return isinstance(value, tuple | list) and all(_fits(each, item) for each in value)
    if kind == "float" and type(value) is int:
        return True
    return type(value) is TYPES.get(kind)


def _wanted(kinds: list[Any]) -> str:
    """Describe the allowed types: `must be int or list of int`."""
    words: list[str] = []
    for kind in kinds:
        if isinstance(kind, str):
            words.append(kind)
        elif "one of" in kind:
            words += [repr(each) for each in kind["one of"]]
        else:
            words.append(f"text as {kind['example']!r}")
    return f"must be {', '.join(words[:-1])}{' or ' * (len(words) > 1)}{words[-1]}"
