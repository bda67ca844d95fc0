"""Reading what a JSON file holds: an object of named values, as all of this project's do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_object(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file; what its fields are is for the caller to check.

    Errors: FileNotFoundError; ValueError, to which the caller adds the file and the cure, for all
    else that a damaged or hostile file may hold.
    """
    try:
        values = json.loads(file.read_text("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("no object of fields")
    return values
