"""What the machine does to a run: a signal, a terminal that is gone, no memory. Each ends in one message, no traceback.

A disk that takes no more is told by sft/files.py; signals during training are those of sft/training/stop.py, which
saves a checkpoint first.
"""

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sft.errors import UserError
from sft.files import MACHINE_ERRORS, write_failure

# What writing to a pipe says that nobody reads any more; on Windows it is EINVAL.
NO_READER = (errno.EPIPE, errno.EIO, *((errno.EINVAL,) if sys.platform == "win32" else ()))
# Ctrl-C, what a scheduler sends some seconds before SIGKILL, a terminal that was closed; Windows has no SIGHUP.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupt(KeyboardInterrupt):
    """A signal that ends the run; no Exception, so that no library takes it for an error of its own."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@contextmanager
def on_signals(handler: Any) -> Iterator[None]:
    """Hands the signals that end a run to `handler(number, frame)`; one that is ignored (nohup, `&`) stays ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, restored in before.items():
            if signal.getsignal(number) == handler:  # not where the run, about to end, has come to ignore it
                signal.signal(number, restored)


def interrupt(number: int, frame: Any) -> None:
    """A handler that unwinds the run, so that what is half-written is removed."""
    raise Interrupt(number)


def exit_code(number: int) -> int:
    """As a shell has it: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + number


class LastingStream:
    """stdout or stderr, whose reader may end before the run: Ctrl-C ends `| tee log` too, and terminals are closed.

    What nobody reads any more is dropped; an error there would cost the checkpoint that is due.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._without_reader():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._without_reader():
            self._stream.flush()

    @contextmanager
    def _without_reader(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in NO_READER:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def lasting_output() -> Iterator[None]:
    """stdout and stderr that outlive their readers."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (LastingStream(stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


@contextmanager
def ended_by_the_machine() -> Iterator[None]:
    """Signals, and a terminal that goes away, for the whole of a run."""
    with ExitStack() as stack:
        stack.enter_context(lasting_output())
        stack.enter_context(on_signals(interrupt))
        yield


# What the system, torch, Windows' torch, CUDA, cuBLAS and C++ say where no memory is left, by errors of any class.
NO_MEMORY = (
    "annot allocate memory",
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library says that memory has run out."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


def memory_failure(error: Exception, advice: str) -> UserError | None:
    """That memory has run out, of the GPU or of the machine, and what to lower; None: it is another kind of error."""
    if not is_out_of_memory(error):
        return None
    whose = "GPU's" if "CUDA" in str(error) or "HIP" in str(error) else "machine's"
    found = next(iter(str(error).splitlines()), "") or type(error).__name__
    return UserError(f"the {whose} memory ran out: {found}\n{advice}")


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Around what may take much memory. Raises: UserError: it has run out, and what to lower."""
    try:
        yield
    except Exception as error:
        if (told := memory_failure(error, advice)) is None:
            raise
        raise told from None


def as_user_error(error: Exception, output_dir: Path) -> UserError | None:
    """What the machine did wherever nobody nearer has told it; None: it is an error of ours."""
    if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
        return write_failure(error, Path(str(error.filename or output_dir)))
    return memory_failure(error, "give the run more memory, or a smaller model, or less of the data at once")
