"""Whether Triton can launch a kernel: its first launch compiles a piece of C, which takes a compiler and Python.h."""

import importlib.util
from functools import cache

import torch

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def _write_one(pointer):  # type: ignore[no-untyped-def]  # Triton reads annotations as its own
        tl.store(pointer, 1)


@cache
def why_triton_fails() -> str | None:
    """None: it works. Else the first line of what went wrong; trl's fused loss, which is Triton's, cannot run then."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        _launch()
    except Exception as error:  # whatever a compiler, a linker or a driver says
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def _launch() -> None:
    written = torch.zeros(1, dtype=torch.int32, device="cuda")
    _write_one[(1,)](written)
    torch.cuda.synchronize()
    if written.item() != 1:
        raise RuntimeError("a kernel of Triton wrote nothing")
