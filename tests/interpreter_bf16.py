"""Make bfloat16 right in Triton's interpreter, which works on its bit patterns as uint16.

Without this, casts to bfloat16 truncate instead of rounding to nearest even, `tl.dot` gives
rubbish, and so does any arithmetic or reduction, without a word (triton 3.6 to 3.9; upstream:
triton-lang/triton issue 11584). Here casts are exact, `tl.dot` takes float32 products as the
tensor cores do, and every other use of bfloat16 raises.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from numpy.typing import NDArray
from triton.runtime import interpreter  # type: ignore[import-untyped, import-not-found, unused-ignore]

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


def install() -> None:
    """Repair the interpreter of this process; a second call changes nothing."""
    if not getattr(Builder, "bfloat16_repaired", False):
        _repair_casts()
        _repair_dot()
        _refuse_arithmetic()
        _refuse_reductions()
        Builder.bfloat16_repaired = True


def to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Read bfloat16 bit patterns as float32 values."""
    wide = np.ascontiguousarray(bits).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(np.shape(bits))


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 values to bfloat16 bit patterns, to nearest even as the hardware does."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def _is_bfloat16(handle: Any) -> bool:
    dtype = getattr(handle, "dtype", None)
    return dtype is not None and dtype.scalar == tl.bfloat16


def _upcast(handle: Any) -> Any:
    return Handle(to_float32(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _repair_casts() -> None:
    cast_impl, create_fp_to_fp = Builder.cast_impl, Builder.create_fp_to_fp

    def cast(builder: Any, source: Any, target: Any) -> Any:
        if _is_bfloat16(source) and target.scalar == tl.bfloat16:
            return source
        if target.scalar == tl.bfloat16:
            return Handle(to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
        # A comparison's handle claims the type of what it compared: never skip a cast for its type.
        return cast_impl(builder, _upcast(source), target)

    def fp_to_fp(builder: Any, source: Any, target: Any, rounding: Any) -> Any:
        toward_zero = rounding is not None and "RTZ" in str(rounding).upper()
        if toward_zero or not (_is_bfloat16(source) or target.scalar == tl.bfloat16):
            return create_fp_to_fp(builder, source, target, rounding)
        return cast(builder, source, target)

    Builder.cast_impl, Builder.create_fp_to_fp = cast, fp_to_fp


def _repair_dot() -> None:
    create_dot = Builder.create_dot

    def dot(builder: Any, left: Any, right: Any, *rest: Any) -> Any:
        return create_dot(builder, _upcast(left), _upcast(right), *rest)

    Builder.create_dot = dot


def _refuse(handles: Any) -> None:
    if any(_is_bfloat16(handle) for handle in handles):
        raise interpreter.InterpreterError(
            "arithmetic or reduction on bfloat16: add .to(tl.float32) after the load"
        )


def _refuse_arithmetic() -> None:
    def guarded(original: Any) -> Any:
        def operation(builder: Any, *operands: Any) -> Any:
            if operands[-1] is not np.where:  # choosing between bit patterns is sound
                _refuse(operands)
            return original(builder, *operands)

        return operation

    Builder.unary_op = guarded(Builder.unary_op)
    Builder.binary_op = guarded(Builder.binary_op)
    Builder.ternary_op = guarded(Builder.ternary_op)


def _refuse_reductions() -> None:
    interface = interpreter.ReduceScanOpInterface
    check_tensor = interface.check_tensor

    def check(operation: Any, inputs: Any) -> Any:
        _refuse(inputs)
        return check_tensor(operation, inputs)

    interface.check_tensor = check
