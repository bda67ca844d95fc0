"""Values from a file as a dataclass: each of the type of its field, or refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Union

import pytest

from reat_fast.storage.typed_fields import from_values


@dataclass(frozen=True)
class Made:
    """One field of each kind that a file of ours has."""

    number: int
    share: float = 0.5
    name: str = "made"
    on: bool = True
    size: int | None = None
    length: float | None = None
    old_size: Union[float, None] = None  # noqa: UP007
    kind: Literal["a", "b", 1] = "a"
    many: tuple[int, ...] = ()
    named: tuple[Literal["x", "y"], ...] = ()


@pytest.mark.parametrize(
    "values",
    [
        {"number": 1},
        {
            "number": -3,
            "share": 2,
            "on": False,
            "size": None,
            "kind": "b",
            "many": (1, 2),
            "length": 2,
        },
        {"number": 0, "share": 1e300, "size": 7, "old_size": 7, "kind": 1, "named": ("y", "x")},
    ],
)
def test_values_of_the_types_of_their_fields_are_taken_as_they_are(values: dict[str, Any]) -> None:
    assert from_values(Made, values) == Made(**values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("number", 1.0),
        ("number", "1"),
        ("number", True),  # which Python counts among the integers
        ("number", None),
        ("share", "0.5"),
        ("share", False),
        ("name", 1),
        ("on", 1),
        ("on", None),
        ("size", 1.5),
        ("size", True),
        ("old_size", "7"),
        ("kind", "c"),
        ("kind", True),  # equals 1
        ("kind", 1.0),
        ("many", [1, 2]),
        ("many", (1, "2")),
        ("many", 5),
        ("named", ("x", "z")),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} cannot be "):
        from_values(Made, {"number": 1, name: value})


def test_a_long_value_is_shown_in_part() -> None:
    with pytest.raises(ValueError) as refused:
        from_values(Made, {"number": "9" * 10_000})
    assert str(refused.value) == "number cannot be '" + "9" * 79


@pytest.mark.parametrize("values", [{}, {"number": 1, "unknown": 2}])
def test_fields_that_are_missing_or_unknown_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        from_values(Made, values)
