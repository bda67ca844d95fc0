"""Radii as the field writes them: fractions of 255 on the command line and in tables."""

from __future__ import annotations

from typing import Annotated

import tyro


def fraction(text: str) -> float:
    """Read a number that may be written as a fraction, as the field writes radii: "8/255"."""
    numerator, _, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is neither a number nor a fraction such as 8/255") from None


def fraction_text(value: float) -> str:
    """Write a radius the way the field does: 8/255 where it is one, the plain number elsewhere."""
    levels = value * 255
    if value < 1 and abs(levels - round(levels)) < 1e-9:
        return f"{round(levels)}/255"
    return f"{value:g}"


Radius = Annotated[
    float,
    tyro.constructors.PrimitiveConstructorSpec[float](
        nargs=1,
        metavar="FLOAT|N/255",
        instance_from_str=lambda words: fraction(words[0]),
        is_instance=lambda instance: isinstance(instance, (int, float)),
        str_from_instance=lambda instance: [fraction_text(instance)],
    ),
]
