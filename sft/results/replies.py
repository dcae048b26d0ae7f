"""The answers that the page and the summary show: those whose chrF moved most, and some at random."""

import random
from typing import NamedTuple

import numpy as np

from sft.results.run_folder import Prediction, Run
from sft.results.scores import ModelName, row_scores
from sft.results.words import plain

REPLIES = {"best": 7, "worst": 7, "random": 6}
GROUPS = {"best": "improved most", "worst": "improved least", "random": "at random"}
SEED = 0


class Reply(NamedTuple):
    """One line of predictions.jsonl, and why it is shown. before, after: chrF of this answer, or None."""

    group: str
    row: Prediction
    before: float | None
    after: float | None


def choose_replies(run: Run) -> list[Reply]:
    """Twenty answers: those whose chrF rose most, fell most, and random others; without a comparison, random ones."""
    predictions = run.predictions or []
    before, after = _chrf(predictions, "base"), _chrf(predictions, "tuned")
    change = after - before
    order = [int(i) for i in np.argsort(-change, kind="stable") if np.isfinite(change[i])]
    best = order[: REPLIES["best"]]
    worst = [i for i in reversed(order) if i not in best][: REPLIES["worst"]]
    rest = [i for i in range(len(predictions)) if i not in best and i not in worst]
    places_left = min(len(rest), sum(REPLIES.values()) - len(best) - len(worst))
    others = sorted(random.Random(SEED).sample(rest, places_left))

    def finite(score: float) -> float | None:
        return float(score) if np.isfinite(score) else None

    groups = {"best": best, "worst": worst, "random": others}
    return [
        Reply(group, predictions[i], finite(before[i]), finite(after[i]))
        for group, rows in groups.items()
        for i in rows
    ]


def _chrf(predictions: list[Prediction], model: ModelName) -> np.ndarray:
    """chrF of each answer of a model, (rows,); not a number where there is none."""
    scores = np.full(len(predictions), np.nan)
    pairs = [(row.get(model), row.get("reference")) for row in predictions]
    rows = [i for i, (answer, reference) in enumerate(pairs) if isinstance(answer, str) and reference]
    if rows:
        answers, references = ([plain(pairs[i][side]) for i in rows] for side in (0, 1))
        scores[rows] = row_scores("chrf", references, {"predictions": answers}).get("chrf", np.nan)
    return scores


def first_of_each_group(replies: list[Reply]) -> list[Reply]:
    return list({reply.group: reply for reply in reversed(replies)}.values())[::-1]
