"""The forgetting meter: the loss on the answers of general rows, before training and after, and what it says."""

from collections.abc import Mapping, Sequence

import numpy as np

from sft.results.scores import RESAMPLES, SEED, Columns, GeneralLoss, Loss, ModelName, row_weights

MUCH = 0.1  # nats a token: the perplexity is 1.1 times what it was


def general_loss(places: Sequence[str], columns: Mapping[ModelName, Columns], left_out: int) -> GeneralLoss:
    """columns: loss_sum and tokens of each answer, by model. places: of its row; a row's answers are drawn together."""
    result: GeneralLoss = {"rows": len(set(places)), "left_out": left_out}
    if not places:
        return result
    weights = np.stack([np.ones(len(places)), *row_weights(np.asarray(places), RESAMPLES, SEED)])
    means: dict[ModelName, np.ndarray] = {}  # of all rows, then of each resample
    for name, column in columns.items():
        tokens = np.asarray(column["tokens"])
        means[name] = (weights @ np.asarray(column["loss_sum"])) / (weights @ tokens)
        result["tokens"] = int(tokens.sum())
        result[name] = _entry(means[name])
    if len(means) == 2:
        result["difference"] = _entry(means["tuned"] - means["base"])
    return result


def _entry(means: np.ndarray) -> Loss:
    low, high = np.percentile(means[1:], [2.5, 97.5]).tolist()
    # Rounded, for the last digits depend on which rows share a batch, and so on the number of processes.
    return {"score": round(float(means[0]), 4), "low": round(low, 4), "high": round(high, 4)}


def has_forgotten(general: GeneralLoss) -> bool:
    """Whether the loss has clearly risen, and by so much that something is to be done about it."""
    difference = general.get("difference")
    return difference is not None and difference["low"] > 0 and difference["score"] >= MUCH


def general_line(general: GeneralLoss) -> str:
    """The meter in a line.

    >>> risen = {"score": 0.33, "low": 0.28, "high": 0.39}
    >>> general_line({"rows": 86, "base": {"score": 2.31}, "tuned": {"score": 2.64}, "difference": risen})
    'general text: loss 2.31 -> 2.64 (+0.33, 95 % 0.28 to 0.39): worse than before'
    """
    if not general["rows"]:
        return "general text: not measured, the tokenizer cannot take it"
    if "difference" not in general:
        return f"general text: loss {general['base']['score']:.2f}"
    before, after, difference = general["base"], general["tuned"], general["difference"]
    low, high = difference["low"], difference["high"]
    if has_forgotten(general):
        verdict = "worse than before"
    elif low > 0:
        verdict = "slightly worse"
    else:
        verdict = "not worse" if high < 0 else "no clear change"
    interval = f"{difference['score']:+.2f}, 95 % {low:.2f} to {high:.2f}"
    return f"general text: loss {before['score']:.2f} -> {after['score']:.2f} ({interval}): {verdict}"
