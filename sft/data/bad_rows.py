"""What the recipe says about rows that cannot be taken as they are: an error, or left out as long as few are."""

from collections import defaultdict
from collections.abc import Iterable

from sft.data.token_cache import TokenFile
from sft.data.tokens import CONTROL, OVERLONG, SHORTENED, UNREADABLE, Problem
from sft.errors import DataError
from sft.recipe import Recipe

SHOWN = 20  # lines printed before a count
# For each kind of problem the recipe key that decides, and what else that key offers.
POLICIES = {
    UNREADABLE: ("dataset.on_error", "skip"),
    CONTROL: ("dataset.control_tokens", "skip, or text to train on it as plain text"),
    OVERLONG: ("dataset.overlength", "trim, or drop"),
    SHORTENED: ("dataset.overlength", "trim, or drop"),
}


def refuse_problems(files: Iterable[tuple[str, list[Problem], int]], recipe: Recipe) -> None:
    """files: each with its problems, and how many rows were read of it.

    Raises: DataError: rows that the recipe's policies do not let pass, with file:line, the first SHOWN kinds of them.
    """
    options = recipe.dataset
    lenient = {
        UNREADABLE: options.on_error == "skip",
        CONTROL: options.control_tokens == "skip",
        OVERLONG: options.overlength != "error",
        SHORTENED: options.overlength != "error",
    }
    lines: list[str] = []
    kinds: set[str] = set()
    count, would_be_left = 0, True  # whether rows of each file are left if on_error skips the bad ones
    for path, problems, rows in files:
        refused = [problem for problem in problems if not lenient[problem.kind]]
        lines += _lines(path, refused)
        kinds.update(problem.kind for problem in refused)
        count += len(refused)
        would_be_left &= sum(problem.kind == UNREADABLE for problem in refused) < max(1, rows)
    if lines:
        if len(lines) > SHOWN:
            lines[SHOWN:] = [f"... and {len(lines) - SHOWN:,} more"]
        policies = sorted({POLICIES[kind] for kind in kinds if kind != UNREADABLE or would_be_left})
        advice = "".join(f"; or set {key}: {choices}" for key, choices in policies)
        mend = "mend the row" if count == 1 else f"mend the {count:,} rows"
        if not would_be_left and count > 1:
            mend = (
                "no row of a file can be used: mend the file, or say how it is read (dataset.columns, dataset.format)"
            )
        raise DataError("\n".join([*lines, f"{mend}{advice}"]))


def _lines(path: object, problems: Iterable[Problem]) -> list[str]:
    """A line for each problem that differs, with how many rows have it and the first of these."""
    numbers: dict[str, list[int]] = defaultdict(list)
    for problem in problems:
        numbers[problem.message].append(problem.line)
    lines = []
    for message, found in numbers.items():
        first = ", ".join(map(str, found[:3])) + (", ..." if len(found) > 3 else "")
        many = f" (in {len(found):,} rows: {first})" if len(found) > 1 else ""
        lines.append(f"{path}:{found[0]}: {message}{many}")
    return lines


def refuse_losses(split: str, files: list[TokenFile], recipe: Recipe) -> None:
    """Raises: DataError: nothing of a split is left to use, or more was lost than dataset.max_lost."""
    read = sum(file.facts["rows"] for file in files)
    lost = sum(len(file.problems) + len(file.facts["trimmed"]) for file in files)
    examples = [line for file in files for line in _lines(file.path, file.problems)[:3]][:SHOWN]
    if not sum(file.facts["used"] for file in files):
        longer = any(problem.kind == OVERLONG for file in files for problem in file.problems)
        advice = ["raise dataset.max_length, if the model takes longer rows"] if longer else []
        raise DataError("\n".join([f"no row of dataset.{split} is left to use", *examples, *advice]))
    if lost > recipe.dataset.max_lost * read:
        raise DataError(
            "\n".join(
                [
                    f"{lost:,} of {read:,} rows of dataset.{split} were skipped, dropped or trimmed "
                    f"({lost / read:.1%}), more than dataset.max_lost {recipe.dataset.max_lost:.1%}",
                    *examples,
                    "mend them, or raise dataset.max_lost (or dataset.max_length, if rows are too long)",
                ]
            )
        )
