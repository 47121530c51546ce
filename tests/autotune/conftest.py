"""Three repairs to Triton's interpreter, which runs the kernels where there is no GPU.

- A loop bound is an array of one element to it, which NumPy 2.4 no longer turns into an int.
- ``tl.dot`` of bf16 multiplies the bit patterns: operands are widened to fp32 first, which is exact.
- fp32 is rounded to bf16 towards zero, which in a long sum is no small error: it is rounded to nearest instead, as a GPU does.
"""

from __future__ import annotations

import os
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor
    _create_dot = interpreter.InterpreterBuilder.create_dot

    def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def _wide(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        data = interpreter._convert_float(operand.data, tl.bfloat16, tl.float32, None).view("float32")
        return interpreter.TensorHandle(data, tl.float32)

    def _create_wide_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return _create_dot(self, _wide(a), _wide(b), *rest)

    _cast = interpreter.InterpreterBuilder.cast_impl

    def _cast_to_nearest(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return _cast(self, source, target)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return interpreter.TensorHandle(np.where(np.isnan(source.data), np.uint16(0x7FC0), nearest), tl.bfloat16)

    interpreter._patch_lang_tensor = _patch_tensor_and_index
    interpreter.InterpreterBuilder.create_dot = _create_wide_dot
    interpreter.InterpreterBuilder.cast_impl = _cast_to_nearest
    interpreter.InterpreterBuilder.create_fp_trunc = _cast_to_nearest
