"""These tests run in a process with TRITON_INTERPRET=1, which test_triton.py starts: the layers then compute on the CPU
by Triton's kernels, in its interpreter."""

import os

import pytest

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if IS_INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def interpreter_knows_bfloat16():
    """The interpreter holds bfloat16 in integers, and its products take them for numbers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def dot(self, a, b, *rest):
        return create_dot(self, widen(a), widen(b), *rest)

    interpreter.InterpreterBuilder.create_dot = dot
    yield
    interpreter.InterpreterBuilder.create_dot = create_dot
