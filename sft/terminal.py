"""What a person at a terminal sees move: one live line at a time. In a pipe or a log file nothing moves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from sft.processes import is_first

UNWRAPPED = Column(no_wrap=True)  # and not cut, as long as there is something else to cut


def is_watched() -> bool:
    """Whether a terminal shows what this process prints, and this process is the one that speaks."""
    return is_first() and Console().is_interactive


class Steps(ProgressColumn):
    """Steps made, and of how many where that is known."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:,.0f}" + ("" if task.total is None else f"/{task.total:,.0f}"))


class TimeLeft(TimeRemainingColumn):
    """The time left in words, nothing while there is no telling."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        if task.total is None or task.time_remaining is None:
            return Text("")
        return Text(f"{super().render(task).plain} left")


class Values(ProgressColumn):
    """The task's field `values`; what the terminal has no room for is cut."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("values", ""), no_wrap=True, overflow="ellipsis")


def live_line() -> Progress:
    """A line that is drawn again and again, and is gone at its end; nothing where nobody looks.

    The time left is by the mean of all steps but the first, so that a slow one, or a pause, moves it little.
    """
    head = (
        TextColumn("{task.description}", markup=False, table_column=UNWRAPPED),
        BarColumn(bar_width=6, table_column=UNWRAPPED),
        Steps(table_column=UNWRAPPED),
        TimeLeft(compact=True, table_column=UNWRAPPED),
    )
    return Progress(
        *head,
        Values(),
        console=Console(),
        transient=True,
        disable=not is_watched(),
        speed_estimate_period=float("inf"),
    )


@contextmanager
def bar(what: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A live line for work in steps. total: how many steps; None: nobody knows. Yields: what to tell the steps made."""
    if total == 0:
        yield lambda steps: None
        return
    with live_line() as progress:
        task = progress.add_task(what, total=total, completed=done)

        def advance(steps: int) -> None:
            progress.advance(task, steps)

        yield advance
