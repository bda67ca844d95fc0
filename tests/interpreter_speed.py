"""Spare Triton's interpreter work that it does again at each call, with the same result.

It looks through its whole language for what to replace before each launch and before each call of
a function within a kernel, `tl.zeros` and `tl.sum` among them, and makes a table of all types for
each type that it looks up. Here the first is done once for a module, and stays done; the second
once for a type. The kernels compute what they did.
"""

from __future__ import annotations

import functools
from typing import Any

import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from triton.runtime import interpreter  # type: ignore[import-untyped, import-not-found, unused-ignore]


def install() -> None:
    """Spare the interpreter of this process that work; a second call changes nothing.

    One that is made otherwise stays as it is.
    """
    known = hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_get_np_dtype")
    if known and not getattr(interpreter, "spared", False):
        interpreter._patch_lang = _once_a_module(interpreter._patch_lang)
        interpreter._get_np_dtype = _once_a_type(interpreter._get_np_dtype)
        interpreter.spared = True


def _once_a_module(patch_lang: Any) -> Any:
    patched: dict[int, Any] = {}  # the names of each module: kept, so that no other gets its id
    nothing_to_undo = getattr(interpreter, "_LangPatchScope", lambda: None)  # older: never undone

    def patch(function: Any) -> Any:
        names = function.__globals__
        if id(names) not in patched:
            patch_lang(function)
            patched[id(names)] = names
        return nothing_to_undo()

    return patch


def _once_a_type(numpy_type: Any) -> Any:
    of_numbers = functools.cache(numpy_type)

    def find(kind: Any) -> Any:  # a block has the type of its elements; pointers have no hash
        scalar = kind.scalar
        return numpy_type(kind) if isinstance(scalar, tl.pointer_type) else of_numbers(scalar)

    return find
