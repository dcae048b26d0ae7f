"""The processes of one run, as torchrun and accelerate start them: who decides, and how all of them come to agree.

Without a launcher there is one process, and nothing here waits for anybody. With one, everything that is read from
disk to decide what comes next is read by the first process (`decide`), and what each process must do itself but may
fail in is agreed upon (`agree`): otherwise one goes on into a collective that the others never enter, and hangs.
"""

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from sft.errors import UserError
from sft.plain_text import plain_text

T = TypeVar("T")
# Rank 0 may merge or score for hours while the others wait, so a hang must not be told from work by a clock here.
PATIENCE = timedelta(days=7)
GRACE_SECONDS = 5  # how long a process keeps an error to itself that the first may be telling too


def rank() -> int:
    """This process's number; 0 is the first, which decides, prints and writes."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes the launcher started, over all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    return rank() == 0


def say(text: str, is_plain: bool = False) -> None:
    """Prints in the first process; as `plain_text` shows it, unless it is plain but for colours of ours."""
    if is_first():
        print(text if is_plain else plain_text(text), flush=True)


def joined() -> bool:
    """Whether there are several and they can talk, which they can once SFTConfig has set up the devices."""
    if count() == 1:
        return False
    from torch import distributed

    return distributed.is_initialized()


@cache
def _group() -> Any:
    """A group of its own on the CPU: an object needs no GPU, and a step's flag then waits for none."""
    from torch import distributed

    return distributed.new_group(backend="gloo", timeout=PATIENCE)


def decide(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, in all of them. Raises: UserError: the first's, in all of them."""
    if not joined():
        return work()
    from torch import distributed

    made: list[Any] = [None, None]  # what it gave, what it raised
    if is_first():
        try:
            made[0] = work()
        except UserError as error:
            made[1] = error
    distributed.broadcast_object_list(made, src=0, group=_group())
    if made[1] is not None:
        raise _agreed(made[1])
    return made[0]


def agree(work: Callable[[], T]) -> T:
    """What `work` gives here, where it raises in no process. Raises: UserError: the lowest rank's, in all of them."""
    if not joined():
        return work()
    made: Any = None
    error = None
    try:
        made = work()
    except UserError as caught:
        error = caught
    for raised in gather(error):
        if raised is not None:
            raise _agreed(raised)
    return made


def gather(value: T) -> list[T]:
    """The value of each process, by rank, in all of them."""
    if not joined():
        return [value]
    from torch import distributed

    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value, group=_group())
    return values


def highest(number: int) -> int:
    """The highest of the processes' numbers, in all of them; one small message, cheap enough for every step."""
    if not joined():
        return number
    import torch

    held = torch.tensor(number)
    torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX, group=_group())
    return int(held)


def wait() -> None:
    """Until all processes are here."""
    highest(0)


def share(values: list[T]) -> list[T]:
    """This process's part: every n-th, so that values in order of length make even parts.

    >>> share(["longest", "long", "short"])
    ['longest', 'long', 'short']
    """
    return values[rank() :: count()]


def tells(error: UserError) -> bool:
    """Whether this process is the one to print an error.

    What all have raised, the first tells. Of another error nobody knows whether the first met it as well: if so, the
    launcher ends this process while it waits here.
    """
    if is_first():
        return True
    if not error.agreed:
        time.sleep(GRACE_SECONDS)
    return not error.agreed


def part(error: UserError | None = None) -> None:
    """Leaves the others; before an end that all agreed on, waits for them.

    A launcher sends SIGTERM to the others once one process has failed. They are about to end too, each with the code
    that says why, so that signal is ignored from here on (torchrun's SIGKILL, 30 s later, is not).
    """
    if not joined():
        return
    from torch import distributed

    if error is not None and error.agreed:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        wait()
    if error is None or error.agreed:
        distributed.destroy_process_group()
        _group.cache_clear()


def _agreed(error: UserError) -> UserError:
    error.agreed = True
    return error
