"""torch.compile when a function is first called, for functions that a library decorates while it is imported."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any

import torch


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """While it is open. bitsandbytes 0.50 decorates four functions, which few runs call; torch imports its compiler for
    them, 0.6 of the 4 seconds that all imports take."""
    compile_now = torch.compile

    def compile_late(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return partial(compile_late, **options)

        @cache
        def compiled() -> Callable[..., Any]:
            return compile_now(function, **options)

        @wraps(function)
        def late(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return late

    vars(torch)["compile"] = compile_late
    try:
        yield
    finally:
        vars(torch)["compile"] = compile_now
