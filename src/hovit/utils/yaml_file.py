"""YAML files, validated against a class; every mistake gives one line."""

import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from .errors import HovitError, nearest, one_line


class _UniqueKeys(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Loader that refuses duplicate keys; plain YAML silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node))
            if key in seen:
                problem = f"key {key!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Read YAML with the safe loader.

    Raises:
        HovitError: if the file is missing, is not YAML, or has a duplicate key.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}" if mark else ""
        raise HovitError(f"{path}{where}: not valid YAML: {error.problem}") from None
    except Exception as error:  # PyYAML raises many types for odd documents
        raise HovitError(f"{path}: cannot be read: {one_line(error)}") from None


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Keys that the object at `location` of `model` accepts."""
    here: Any = model
    for key in location:
        if isinstance(key, str) and isinstance(here, type) and issubclass(here, BaseModel):
            field = here.model_fields.get(key)
            here = field.annotation if field else here
        while args := [a for a in get_args(here) if a is not type(None) and a is not Ellipsis]:
            here = args[-1]
    return (
        list(here.model_fields) if isinstance(here, type) and hasattr(here, "model_fields") else []
    )


def explain(error: ValidationError, where: object, model: type[BaseModel]) -> HovitError:
    """First mistake of a ValidationError in one line: file, key path, what is allowed."""
    # Unknown keys first: a misspelt key also counts as missing under its right name.
    first, *others = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    keys = [k if isinstance(k, int) or k.isprintable() else repr(k) for k in first["loc"]]
    path = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in keys).lstrip(".")
    if first["type"] == "extra_forbidden":
        allowed = _fields_at(model, first["loc"][:-1])
        what = f"unknown key{nearest(keys[-1], allowed)}; allowed: {', '.join(allowed)}"
    else:
        given = repr(first["input"])
        what = first["msg"][0].lower() + first["msg"][1:]
        what += f", not {given[:60]}" if first["type"] != "missing" else ""
        if first["type"] == "literal_error":
            what += nearest(first["input"], re.findall(r"'([^']*)'", first["ctx"]["expected"]))
    more = f" (and {len(others)} more)" if others else ""
    return HovitError(f"{where}: {path or 'the whole file'}: {what}{more}")


def load_file(path: Path, model: type[BaseModel]) -> Any:
    """Read one YAML file as `model`.

    Raises:
        HovitError: in one line, with file and key path.
    """
    try:
        loaded = model.model_validate(read_yaml(path))
    except ValidationError as error:
        raise explain(error, path, model) from None
    except RecursionError:
        raise HovitError(f"{path}: cannot be read: nested too deep") from None
    if getattr(loaded, "id", path.stem) != path.stem:
        raise HovitError(f"{path}: id: must be the file's name, {path.stem!r}")
    return loaded
