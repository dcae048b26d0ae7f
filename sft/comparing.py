"""--compare: runs against each other, without their recipes or models."""

from itertools import count
from pathlib import Path

from sft.errors import UserError
from sft.processes import say
from sft.results.comparison import compare_runs
from sft.results.page import write_comparison
from sft.results.summary import comparison_summary

LONGEST_NAME = 120  # characters of a folder's name


def compare(folders: list[str], output: str | None) -> int:
    """Writes comparison.html, into a folder that has none yet, and says what it found. Returns: the exit code.

    Raises: UserError: what is named is no runs that can be compared, or `output` holds a comparison.
    """
    comparison = compare_runs([Path(folder) for folder in folders])
    page = write_comparison(comparison, _new_folder([run.folder for run in comparison.runs], output))
    say(comparison_summary(comparison, page))
    return 0


def _new_folder(runs: list[Path], output: str | None) -> Path:
    """The folder to write into: `output`, or one in output/ named after the runs."""
    if output is not None:
        if (Path(output) / "comparison.html").exists():
            raise UserError(f"--output: {output} holds a comparison.html already; name another folder, or remove it")
        return Path(output)
    name = "_".join(["comparison", *(run.resolve().name for run in runs)])[:LONGEST_NAME]
    numbered = (Path("output", name + (f"_{number}" if number > 1 else "")) for number in count(1))
    return next(folder for folder in numbered if not folder.exists())
