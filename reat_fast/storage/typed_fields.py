"""Values from a file as a dataclass, each of the type that its field has."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Made = TypeVar("Made")


def from_values(kind: type[Made], values: Mapping[str, Any]) -> Made:
    """Make a dataclass of values by field name.

    Errors: TypeError or ValueError for a field that is missing, unknown or of another type.
    """
    for name, hint in get_type_hints(kind).items():
        if name in values and not _fits(values[name], hint):
            raise ValueError(f"{name} cannot be {values[name]!r:.80}")
    return kind(**values)


def _fits(value: Any, hint: Any) -> bool:
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in inner)
    if get_origin(hint) is tuple:  # of any length
        return isinstance(value, tuple) and all(_fits(item, inner[0]) for item in value)
    if isinstance(value, bool):  # which Python counts among the integers
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
