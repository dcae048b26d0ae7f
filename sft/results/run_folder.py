"""The folder of a run as it lies on disk: the shapes of its files, and the reading of them."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from sft.errors import UserError
from sft.files import write_bytes
from sft.results.scores import Scores

DESCRIPTIONS = ("training_config.json", "data_ledger.json")  # what a run writes before it trains


class Prediction(TypedDict):
    """A line of predictions.jsonl. turn: the number of the message, from 0; base, tuned: None if not scored."""

    row: str
    turn: int
    messages: list[dict[str, Any]]
    reference: str
    base: str | None
    tuned: str | None


@dataclass
class Run:
    """What output_dir holds; a file that is not there is None.

    config: training_config.json, as sft.results.export.describe_run makes it, and "resources" of a finished run.
    ledger: data_ledger.json. state: trainer_state.json, which the Trainer writes.
    """

    folder: Path
    config: dict[str, Any]
    ledger: dict[str, Any] | None
    state: dict[str, Any] | None
    scores: Scores | None
    predictions: list[Prediction] | None

    @property
    def recipe(self) -> dict[str, Any]:
        return self.config.get("recipe") or {}

    @property
    def log(self) -> list[dict[str, Any]]:
        return (self.state or {}).get("log_history") or []


def kept(folder: Path) -> Callable[[], None]:
    """Remembers a folder. Returns: what puts it back as it was, unless something beside descriptions came into it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    before = {path.name: path.stat() for path in folder.iterdir()} if folder.is_dir() else {}
    contents = {name: (folder / name).read_bytes() for name in DESCRIPTIONS if name in before}
    times = {name: (before[name].st_atime_ns, before[name].st_mtime_ns) for name in contents}

    def put_back() -> None:
        if not folder.is_dir() or {path.name for path in folder.iterdir()} - before.keys() - {*DESCRIPTIONS, ".lock"}:
            return
        for name in DESCRIPTIONS:
            if name in contents:
                write_bytes(folder / name, contents[name])
                os.utime(folder / name, ns=times[name])
            else:
                (folder / name).unlink(missing_ok=True)
        for path in made:
            path.rmdir()

    return put_back


def read_run(folder: Path) -> Run:
    """Raises: UserError: there is no training_config.json, or a file is not JSON."""
    config = read_file(folder / "training_config.json")
    if config is None:
        raise UserError(f"there is no {folder / 'training_config.json'}; name the folder of a run")
    names = ("data_ledger.json", "trainer_state.json", "scores.json", "predictions.jsonl")
    return Run(folder, config, *(read_file(folder / name) for name in names))


def read_file(path: Path) -> Any:
    """What a .json or a .jsonl file holds; None: there is none. Raises: UserError: it cannot be read."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix != ".jsonl":
        return _parsed(content, str(path))
    # Not splitlines: JSON text may hold other line ends, such as U+2028.
    lines = enumerate(content.split(b"\n"), start=1)
    return [_parsed(line, f"{path}:{number}") for number, line in lines if line.strip()]


def _parsed(content: bytes, place: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}; restore it, or remove it and run the recipe again") from None
