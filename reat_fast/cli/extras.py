"""Packages that reat_fast does without until something asks for them."""

from __future__ import annotations

import importlib
from typing import Any


def import_extra(module: str, what: str, extra: str) -> Any:
    """Import a module of a package that `reat-fast[extra]` installs, for `what` the user asked.

    Errors: ValueError with the pip line where it is missing.
    """
    try:
        imported = importlib.import_module(module)
    except ImportError:
        imported = None
    # A plain folder of that name, such as the one W&B leaves behind, imports too but has no file.
    if imported is None or imported.__file__ is None:
        name = module.rpartition(".")[2]
        raise ValueError(f'{what} needs {name}: pip install "reat-fast[{extra}]"')
    return imported
