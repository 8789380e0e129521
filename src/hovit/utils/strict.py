"""Base classes of typed data."""

from functools import cache
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class Strict(BaseModel):
    """A frozen object that refuses unknown keys, infinite numbers and values of another type.

    An integer is accepted as a float, and a list as a tuple, because YAML and JSON have no tuples.
    Nothing else is converted: not text to a number, nor 1.0 to an integer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _lists_to_tuples(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {k: _tuples(v) if k in _tuple_fields(cls) else v for k, v in data.items()}


@cache
def _tuple_fields(cls: type[BaseModel]) -> frozenset[str]:
    """Fields whose type has a tuple in it."""
    fields = cls.model_fields.items()
    return frozenset(name for name, field in fields if "tuple" in str(field.annotation))


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(each) for each in value)
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    return value


class InSpec(Strict):
    """Data that the spec of a record states.

    A spec states every field in `always`, and each other field that is not at its default. A new
    field with a default therefore changes no existing spec and no hash. `always` lists the fields
    that the first records state; it does not grow. Do not change the default of any other field:
    existing records mean the old one.

    Fields in `never` decide no result: identifiers and prose.
    """

    always: ClassVar[frozenset[str]] = frozenset()
    never: ClassVar[frozenset[str]] = frozenset()

    def to_spec(self) -> dict[str, Any]:
        """The fields that decide a result, as JSON values."""
        stated = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            is_default = not field.is_required() and value == field.get_default()
            if name not in self.never and (name in self.always or not is_default):
                stated[name] = json_value(value)
        return stated


def json_value(value: Any) -> Any:
    """A value of the config as JSON has it: tuples become lists."""
    if isinstance(value, InSpec):
        return value.to_spec()
    if isinstance(value, tuple | list):
        return [json_value(each) for each in value]
    if isinstance(value, dict):
        return {key: json_value(each) for key, each in value.items()}
    return value
