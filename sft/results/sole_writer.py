"""One writer at a time in output_dir."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from sft import processes
from sft.files import writing
from sft.recipe import Recipe
from sft.results.export import make_output_dir


@contextmanager
def sole_writer(recipe: Recipe) -> Iterator[None]:
    """Makes output_dir, and keeps every other run, --score and --export out of it while it is open.

    Raises: UserError: it cannot be written, or another run is writing there.
    """
    lock = FileLock(recipe.output_dir / ".lock")  # the system lets go of it when a run is killed
    processes.decide(lambda: _lock(recipe, lock))
    try:
        yield
    finally:
        if lock.is_locked:
            if isinstance(lock, FileLock) and sys.platform != "win32":  # elsewhere the lock removes it itself
                Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: later it might be the next run's
            lock.release()


def _lock(recipe: Recipe, lock: BaseFileLock) -> None:
    make_output_dir(recipe)
    try:
        with writing(recipe.output_dir):
            lock.acquire(timeout=0)
    except Timeout:
        raise recipe.error(
            "output_dir", f"another run is writing to {recipe.output_dir}; wait until it ends, or name another folder"
        ) from None
