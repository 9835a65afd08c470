"""Dataclasses from JSON text. Every field must be there with the right type, and no other field."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, cast, get_args, get_origin, get_type_hints

# Brings the fields of an older version, and that version, to the newest form.
Upgrade = Callable[[dict[str, Any], int], dict[str, Any]]


def read(
    kind: type,
    text: str,
    version: int | None = None,
    remedy: str = "",
    upgrade: Upgrade | None = None,
) -> Any:
    """Parses an instance of `kind`, whose fields may be dataclasses, mappings and tuples.

    Args:
      kind: the dataclass.
      text: JSON as its `to_json` writes it.
      version: the newest value of the entry "version"; None if the text has no such entry.
      remedy: sentence that ends the error about another version.
      upgrade: converts the entries of older versions, from 1; None if only the newest is read.

    Raises:
      ValueError: not JSON, an unknown version, or fields missing, unknown or of another type.
    """
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"text must be JSON as {kind.__name__}.to_json writes it, got text that is not JSON: "
            f"{error}."
        ) from error
    if version is not None and isinstance(entries, dict):
        entries = cast(dict[str, Any], entries)
        given = entries.pop("version", None)
        is_older = upgrade is not None and type(given) is int and 1 <= given < version
        if given != version and not is_older:
            raise ValueError(
                f"The version of this {kind.__name__} must be {version}, got {given!r}. {remedy}"
            )
        if upgrade is not None and given != version:
            entries = upgrade(entries, cast(int, given))
    return _from_entries(kind, entries)


def _from_entries(kind: type, entries: Any) -> Any:
    types = get_type_hints(kind)
    if not isinstance(entries, dict):
        raise ValueError(
            f"A {kind.__name__} must be a JSON object with the fields {sorted(types)}, got "
            f"{entries!r}."
        )
    entries = cast(dict[str, Any], entries)
    missing = sorted(set(types) - set(entries))
    unknown = sorted(set(entries) - set(types))
    if missing or unknown:
        raise ValueError(
            f"A {kind.__name__}'s JSON must have exactly its fields, got it without {missing} and "
            f"with the unknown {unknown}."
        )
    return kind(
        **{name: _of_type(types[name], entries[name], f"{kind.__name__}.{name}") for name in types}
    )


def _of_type(expected: Any, value: Any, name: str) -> Any:
    """Converts a JSON value to the type of the field `name`."""
    if dataclasses.is_dataclass(expected):
        return _from_entries(cast(type, expected), value)
    if get_origin(expected) is tuple and isinstance(value, list):
        items = cast(list[Any], value)
        return tuple(_of_type(get_args(expected)[0], item, name) for item in items)
    if get_origin(expected) is Mapping and isinstance(value, dict):
        entries = cast(dict[str, Any], value)
        return {
            key: _of_type(get_args(expected)[1], item, f"{name}[{key!r}]")
            for key, item in entries.items()
        }
    accepted = {expected, *get_args(expected)}
    if type(value) in accepted or (type(value) is int and float in accepted):
        return value
    raise ValueError(
        f"{name} must be of type {getattr(expected, '__name__', expected)}, got {value!r}."
    )
