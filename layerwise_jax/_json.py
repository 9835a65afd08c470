"""Dataclasses from JSON text, with just their fields, each of its type; anything else is refused by
name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints


def read(kind: type, text: str, version: int | None = None, remedy: str = "") -> Any:
    """An instance of `kind`, which may hold others, mappings and tuples.

    Args:
      kind: the dataclass.
      text: as its `to_json` wrote it.
      version: which has to stand beside the fields; None for none.
      remedy: what to do about another version.

    Raises:
      ValueError: not JSON, of another version, or with fields missing, unknown or of the wrong
        type.
    """
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"A {kind.__name__} is JSON text as to_json() writes it; this is not JSON: {error}."
        ) from error
    if version is not None:
        came = fields.pop("version", None) if isinstance(fields, dict) else None
        if came != version:
            raise ValueError(
                f"This {kind.__name__} has version {came!r}; this library reads version "
                f"{version}. {remedy}"
            )
    return _from_fields(kind, fields)


def _from_fields(kind: type, fields: Any) -> Any:
    wanted = get_type_hints(kind)
    if not isinstance(fields, dict):
        raise ValueError(f"A {kind.__name__} has the fields {sorted(wanted)}; {fields!r} came.")
    missing, unknown = sorted(set(wanted) - set(fields)), sorted(set(fields) - set(wanted))
    if missing or unknown:
        raise ValueError(
            f"A {kind.__name__}'s JSON lacks the fields {missing} and has unknown ones {unknown}."
        )
    return kind(
        **{name: _of_type(wanted[name], fields[name], f"{kind.__name__}.{name}") for name in wanted}
    )


def _of_type(wanted: Any, value: Any, name: str) -> Any:
    """A value read from JSON, as the type of the field `name`."""
    if dataclasses.is_dataclass(wanted):
        return _from_fields(wanted, value)  # type: ignore[arg-type]
    if get_origin(wanted) is tuple and isinstance(value, list):
        return tuple(_of_type(get_args(wanted)[0], item, name) for item in value)
    if get_origin(wanted) is Mapping and isinstance(value, dict):
        return {
            key: _of_type(get_args(wanted)[1], item, f"{name}[{key!r}]")
            for key, item in value.items()
        }
    accepted = {wanted, *get_args(wanted)}
    if type(value) in accepted or (type(value) is int and float in accepted):
        return value
    raise ValueError(f"{name} is {value!r}; wanted {getattr(wanted, '__name__', wanted)}.")
