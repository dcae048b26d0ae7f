"""Compares runs by their folders: their answers to the same test rows, scored anew, and what differs between them."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sft.errors import UserError
from sft.results.curves import curves_of
from sft.results.forgetting import general_line
from sft.results.run_folder import Run, read_run
from sft.results.scores import (
    RESAMPLES,
    SEED,
    Measurement,
    ScoreEntry,
    compare,
    load_metric,
    measure,
    metric_names,
    row_scores,
    row_weights,
)
from sft.results.words import ALPHA, duration, judged, number, plain, since

LETTERS = "ABCDEF"  # a run each: as many lines as can be told apart in a plot
TEXTS = {"predictions", "references"}  # the columns that predictions.jsonl holds


class CommonRow(NamedTuple):
    """An answer of the test split that all runs gave. place: in the first run; answers: one a run."""

    place: str
    messages: list[dict[str, Any]]
    reference: str
    answers: list[str]


class Against(NamedTuple):
    """A run's score against the first run's. outcome: better | worse | ""; low, high: of the difference, 95 %."""

    outcome: str
    verdict: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None


class ComparedScore(NamedTuple):
    """One score of all runs. entries: one a run; against: one for each run but the first."""

    name: str
    higher_is_better: bool | None
    entries: list[ScoreEntry]
    against: list[Against]


class Difference(NamedTuple):
    """A key, and its value in each run, as text."""

    key: str
    values: list[str]


@dataclass
class Comparison:
    """left_out: of each run, how many of its answers not all runs have. notes: what to know before reading scores."""

    runs: list[Run]
    rows: list[CommonRow]
    left_out: list[int]
    scores: list[ComparedScore]
    notes: list[str]
    recipe: list[Difference]
    origin: list[Difference]
    training: list[Difference]


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Raises: UserError: a folder is no run with scores, or the runs have no test row in common."""
    if not 2 <= len(folders) <= len(LETTERS):
        raise UserError(f"--compare takes 2 to {len(LETTERS)} folders of runs, found {len(folders)}")
    places = [folder.resolve() for folder in folders]
    if twice := next((folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1), None):
        raise UserError(f"{twice} is named twice; a run is compared with others")
    runs = [_read(folder) for folder in folders]
    rows = common_rows(runs)
    if not rows:
        tested = "; ".join(f"{run.folder} on {_test_files(run)}" for run in runs)
        raise UserError(
            f"the runs have no row of a test split in common: {tested}; score one on the other's file: "
            "python run_sft.py RECIPE --score dataset.test=FILE"
        )
    configs = [run.config for run in runs]
    scores, notes = _compare_scores(runs, rows)
    return Comparison(
        runs,
        rows,
        [len(run.predictions or []) - len(rows) for run in runs],
        scores,
        [*_notes(runs), *notes],
        [d for d in _differences([run.recipe for run in runs]) if d.key != "output_dir"],
        _differences(
            [{key: config.get(key) for key in ("commit", "device", "versions", "data")} for config in configs]
        ),
        list(_training(runs)),
    )


def _read(folder: Path) -> Run:
    """Raises: UserError: it is no run, it was not scored, or a file is not what a run writes."""
    run = read_run(folder)
    again = f"score the run: python run_sft.py RECIPE output_dir={folder} dataset.test=FILE --score"
    files: dict[str, Any] = {
        "training_config.json": run.config,
        "data_ledger.json": run.ledger,
        "trainer_state.json": run.state,
    }
    for name, value in files.items():
        if not isinstance(value, dict | None):
            raise UserError(f"{folder / name} is not what a run writes; restore it")
    for name, scored in (("scores.json", run.scores), ("predictions.jsonl", run.predictions)):
        if not scored:
            raise UserError(f"there is no {folder / name}, or it is empty; {again}")
    if not _are_scores(run.scores):
        raise UserError(f"{folder / 'scores.json'} holds no scores of a trained model; {again}")
    for line, row in enumerate(run.predictions or [], start=1):
        if not _is_answer(row):
            raise UserError(f"{folder / 'predictions.jsonl'}:{line} is no answer of a trained model; {again}")
    return run


def _are_scores(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("rows"), int):
        return False
    tuned, higher = value.get("tuned"), value.get("higher_is_better")
    return isinstance(higher, dict) and isinstance(tuned, dict) and all(isinstance(e, dict) for e in tuned.values())


def _is_answer(row: Any) -> bool:
    types = {"row": str, "messages": list, "reference": str, "tuned": str}
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(key), kind) for key, kind in types.items())
        and not any(re.search("[\ud800-\udfff]", row[key]) for key in ("reference", "tuned"))  # no metric takes these
        and all(isinstance(message, dict) and "role" in message for message in row["messages"])
    )


def _test_files(run: Run) -> str:
    return ", ".join(dict.fromkeys(row["row"].rpartition(":")[0] for row in run.predictions or []))


def common_rows(runs: Sequence[Run]) -> list[CommonRow]:
    """The answers that all runs gave to the same messages with the same reference, in the order of the first run.

    A row that a test split holds twice is matched twice.
    """
    by_content: list[dict[tuple[str, int], Any]] = []
    for run in runs:
        seen: Counter[str] = Counter()
        found = {}
        for row in run.predictions or []:
            content = json.dumps([row["messages"], row["reference"]], sort_keys=True)
            found[content, seen[content]] = row
            seen[content] += 1
        by_content.append(found)
    first, *others = by_content
    return [
        CommonRow(row["row"], row["messages"], row["reference"], [found[key]["tuned"] for found in by_content])
        for key, row in first.items()
        if all(key in found for found in others)
    ]


# ---------------------------------------------------------------------------------------------------------- the scores


def _compare_scores(runs: Sequence[Run], rows: Sequence[CommonRow]) -> tuple[list[ComparedScore], list[str]]:
    """Scores of texts are computed anew; others stand as scores.json has them. With them, what cannot be compared."""
    stored = [run.scores or {} for run in runs]
    languages = [scores.get("language", "other") for scores in stored]
    asked = [name for run in runs for name in run.recipe.get("evaluation", {}).get("metrics", [])]
    others = {name: None for entries in stored for name in entries["tuned"]}
    scores: list[ComparedScore] = []
    notes = []
    if len(set(languages)) > 1:
        scored = ", ".join(f"{letter} {each}" for letter, each in zip(LETTERS, languages, strict=False))
        notes.append(f"the runs were scored as another language each ({scored}); here all are scored as A was")
    known = metric_names()
    for metric in dict.fromkeys(name for name in [*asked, *others] if name in known):
        module = load_metric(metric)
        if set(module.features) <= TEXTS:
            scores += _score_anew(metric, module, rows, languages[0])
    anew = {score.name for score in scores}
    refused: dict[str, list[str]] = {}  # by reason
    for name in (name for name in others if name not in anew):
        entries = [each["tuned"].get(name) for each in stored]
        if missing := [letter for letter, entry in zip(LETTERS, entries, strict=False) if not entry]:
            refused.setdefault(f"{', '.join(missing)} has no such score", []).append(name)
        elif len({entry.get("signature") for entry in entries if entry}) > 1:
            refused.setdefault("it was not computed alike (the signatures differ)", []).append(name)
        elif any(each["rows"] != len(rows) for each in stored):
            refused.setdefault("it cannot be computed for the common rows alone", []).append(name)
        else:
            unknown = Against("", "no verdict: predictions.jsonl does not hold what it is computed from")
            higher = stored[0]["higher_is_better"].get(name)
            scores.append(ComparedScore(name, higher, [e for e in entries if e], [unknown] * (len(runs) - 1)))
    notes += [f"not compared: {', '.join(names)}; {reason}" for reason, names in refused.items()]
    return scores, notes


def _score_anew(metric: str, module: Any, rows: Sequence[CommonRow], language: str) -> Iterator[ComparedScore]:
    references, units = [row.reference for row in rows], np.array([row.place for row in rows])
    measured = []
    for answers in zip(*(row.answers for row in rows), strict=True):
        weights = row_weights(units, RESAMPLES, SEED)  # the same draws for each run
        measured.append(measure(metric, module, {"predictions": answers, "references": references}, language, weights))
    first, *others = measured
    for name in first.scores:
        against = [_against(name, first, each, module.higher_is_better, len(np.unique(units))) for each in others]
        yield ComparedScore(name, module.higher_is_better, [each.entry(name) for each in measured], against)


def _against(name: str, first: Measurement, other: Measurement, higher: bool | None, units: int) -> Against:
    p, before, after = compare(name, first, other, higher, units), first.scores[name], other.scores[name]
    if before is None or after is None:
        return Against("", f"no verdict: {p}")
    draws = other.resampled[name] - first.resampled[name]
    low, high = np.percentile(draws[np.isfinite(draws)], [2.5, 97.5]).tolist()
    outcome = verdict = ""
    if higher is None:
        pass  # neither more nor less of it is better
    elif isinstance(p, str):
        verdict = f"no verdict: {p}"
    else:
        outcome, verdict = judged(p, (after > before) == higher, "difference")
    return Against(outcome, verdict, after - before, low, high)


def headline(comparison: Comparison) -> str:
    """The verdicts in a sentence."""
    said = []
    for i, letter in enumerate(LETTERS[1 : len(comparison.runs)]):
        parts = []
        for outcome in ("better", "worse"):
            if names := [score.name for score in comparison.scores if score.against[i].outcome == outcome]:
                parts.append(f"{outcome} than A by {', '.join(names)}")
        said.append(f"{letter} is {' and '.join(parts)}" if parts else f"no score tells {letter} from A clearly")
    answers = f"{len(comparison.rows):,} answer{'s' if len(comparison.rows) > 1 else ''}"
    return f"On {answers} to the same test rows {'; '.join(said)} (p < {ALPHA})."


def by_spread(rows: Sequence[CommonRow]) -> list[tuple[CommonRow, list[float]]]:
    """Each row with the chrF of its answers, those first in which the runs differ most."""
    references = [plain(row.reference) for row in rows]
    scores = np.array(
        [
            row_scores("chrf", references, {"predictions": list(map(plain, answers))})["chrf"]
            for answers in zip(*(row.answers for row in rows), strict=True)
        ]
    )
    order = np.argsort(-np.nan_to_num(np.ptp(scores, axis=0)), kind="stable")
    return [(rows[i], scores[:, i].tolist()) for i in order]


# ----------------------------------------------------------------------------------------------------- what differs


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    """What makes answers differ beside the training."""
    if _differences([run.recipe.get("evaluation", {}).get("generation", {}) for run in runs]):
        yield "the answers were generated under other settings (evaluation.generation)"
    models = [(run.scores or {}).get("model", "unknown") for run in runs]
    if len(set(models)) > 1:
        listed = ", ".join(f"{letter} {model}" for letter, model in zip(LETTERS, models, strict=False))
        yield f"other models answered (evaluation.model): {listed}"


def _differences(values: Sequence[dict[str, Any]]) -> list[Difference]:
    """The keys, at any depth, whose values are not the same in all."""
    flat = [dict(_flat(value)) for value in values]
    keys = dict.fromkeys(key for each in flat for key in each)
    found = [Difference(key, [each.get(key, "absent") for each in flat]) for key in keys]
    return [difference for difference in found if len(set(difference.values)) > 1]


def _flat(value: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, child in value.items():
        name = f"{above}.{key}" if above else str(key)
        if isinstance(child, dict) and child:
            yield from _flat(child, name)
        elif name.startswith("data.") or name == "commit":
            commit, changes, _ = str(child).partition("+")  # a digest
            yield name, commit[:12] + (" with changes" if changes else "")
        else:
            yield name, child if isinstance(child, str) else json.dumps(child, ensure_ascii=False, default=str)


def _training(runs: Sequence[Run]) -> Iterator[Difference]:
    """What the training took, and where it came to; a figure that no run has is left out."""
    figures = [_figures(run) for run in runs]
    for name in figures[0]:
        if any(each[name] for each in figures):
            yield Difference(name, [each[name] or "–" for each in figures])


def _figures(run: Run) -> dict[str, str]:
    state, resources, ledger = run.state or {}, run.config.get("resources") or {}, run.ledger or {}
    files = [file for file in ledger.get("files", []) if file.get("split") == "train" and "tokens" in file]
    losses = {name: curve.finite for name, curve in curves_of(run.log, "Loss").items()}
    seconds = (resources.get("seconds") or {}).get("train")
    memory = {
        f"peak {kind}memory": resources.get(key)
        for kind, key in (("", "peak_memory_bytes"), ("GPU ", "peak_gpu_memory_bytes"))
    }
    general = (run.scores or {}).get("general")
    return {
        "steps": f"{state['global_step']:,}" if "global_step" in state else "",
        "epochs": number(state["epoch"]) if state.get("epoch") else "",
        "conversations": f"{ledger['rows']['train']:,}" if "train" in (ledger.get("rows") or {}) else "",
        "tokens of the training files": f"{sum(file['tokens'] for file in files):,}" if files else "",
        "training time": duration(seconds) + since(resources) if seconds and math.isfinite(seconds) else "",
        **{name: f"{size / 1e9:.1f} GB" if size else "" for name, size in memory.items()},
        **{f"last {name} loss": number(values[-1]) if len(values) else "" for name, values in losses.items()},
        "general text": general_line(general).removeprefix("general text: ") if general else "",
    }
