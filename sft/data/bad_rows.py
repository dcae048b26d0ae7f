"""What the recipe says about rows that cannot be taken as they are: an error, or left out as long as few are."""

from collections.abc import Iterable

from sft.data.token_cache import TokenFile
from sft.data.tokens import CONTROL, OVERLONG, SHORTENED, UNREADABLE, Problem
from sft.errors import DataError
from sft.recipe import Recipe

SHOWN = 20  # problems printed before a count
# For each kind of problem the recipe key that decides, and what else that key offers.
POLICIES = {
    UNREADABLE: ("dataset.on_error", "skip"),
    CONTROL: ("dataset.control_tokens", "skip, or text to train on it as plain text"),
    OVERLONG: ("dataset.overlength", "trim, or drop"),
    SHORTENED: ("dataset.overlength", "trim, or drop"),
}


def refuse_problems(files: Iterable[tuple[str, list[Problem]]], recipe: Recipe) -> None:
    """Raises: DataError: rows that the recipe's policies do not let pass, with file:line, the first SHOWN of them."""
    options = recipe.dataset
    lenient = {
        UNREADABLE: options.on_error == "skip",
        CONTROL: options.control_tokens == "skip",
        OVERLONG: options.overlength != "error",
        SHORTENED: options.overlength != "error",
    }
    refused = [(path, problem) for path, problems in files for problem in problems if not lenient[problem.kind]]
    if refused:
        lines = [f"{path}:{problem.line}: {problem.message}" for path, problem in refused[:SHOWN]]
        if len(refused) > SHOWN:
            lines.append(f"... and {len(refused) - SHOWN:,} more")
        policies = sorted({POLICIES[problem.kind] for _, problem in refused})
        advice = "; or set ".join(f"{key}: {choices}" for key, choices in policies)
        rows = "the row" if len(refused) == 1 else f"the {len(refused):,} rows"
        raise DataError("\n".join([*lines, f"mend {rows}; or set {advice}"]))


def refuse_losses(split: str, files: list[TokenFile], recipe: Recipe) -> None:
    """Raises: DataError: nothing of a split is left to use, or more was lost than dataset.max_lost."""
    read = sum(file.facts["rows"] for file in files)
    lost = sum(len(file.problems) + len(file.facts["trimmed"]) for file in files)
    examples = [f"{file.path}:{p.line}: {p.message}" for file in files for p in file.problems[:3]][:SHOWN]
    if not sum(file.facts["used"] for file in files):
        raise DataError("\n".join([f"no row of dataset.{split} is left to use", *examples]))
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
