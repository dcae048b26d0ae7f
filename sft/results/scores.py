"""Scores of answers against references, each with a 95 % bootstrap interval and, base against tuned, a p-value.

A metric is one file, metrics/NAME/NAME.py: an `evaluate` module that imports nothing of ours. Its contract:

- the names of its `features` are the columns it is given: predictions, references, finished (the answer ended by
  itself), and of the references' tokens loss_sum (nats), correct (ranked first by the model) and tokens (their number);
- `_compute` takes these, and `language` if its score depends on it, and returns {name: score, ..., "signature": str};
  a score that cannot be computed is None, and "reason" says why;
- if the score is a function of sums over rows, `_compute` also returns "row_statistics", an array (rows, k), and a
  method `score_of(totals)` turns sums, an array (..., k), into {name: array (...)}. A resample then costs one product;
  other metrics are computed anew on each resample;
- `higher_is_better` is True, False, or None where neither is better: then there is no p-value.

What several of these files say (the _info, the choice of tokens by language) cannot be said once: evaluate 0.4.6 copies
a module into a folder of its cache with, of its relative imports, only files that lie beside it (`from .x import y`; it
passes over `from ..x`), and an absolute import of ours fails wherever this repository is not on the path.
"""

import difflib
import inspect
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict

import numpy as np

from sft.errors import RecipeError

FOLDER = Path(__file__).resolve().parents[2] / "metrics"
LANGUAGES = ("zh", "ja", "th", "other")
RESAMPLES = 1000
SEED = 0
MIN_UNITS_FOR_P = 20  # equal models got p < 0.05 in 14 % of trials with 6 rows, in 10 % with 10, in 6 % with 20

HAN = re.compile(r"[\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
KANA = re.compile(r"[\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f]")
THAI = re.compile(r"[\u0e01-\u0e3a\u0e40-\u0e4e]")
LETTER = re.compile(r"[^\W\d_]|[\u0e31\u0e34-\u0e3a\u0e47-\u0e4e]")  # Thai vowel and tone signs are not \w

Columns = Mapping[str, Sequence[Any]]  # what is known of each answer, one value a reference
ModelName = Literal["base", "tuned"]


class ScoreEntry(TypedDict, total=False):
    """One score of one model: score, low, high and signature, or, where it cannot be computed, None and a reason.

    low, high: percentiles 2.5 and 97.5 of the resamples' scores.
    """

    score: float | None
    low: float
    high: float
    signature: str
    reason: str


class Loss(TypedDict):
    """Nats a token, and its 95 % bootstrap interval."""

    score: float
    low: float
    high: float


class GeneralLoss(TypedDict, total=False):
    """The loss on all answers of `rows` general rows (forgetting.py).

    left_out: rows that the tokenizer cannot take. difference: tuned - base.
    """

    rows: int
    left_out: int
    tokens: int
    base: Loss
    tuned: Loss
    difference: Loss


class Scores(TypedDict, total=False):
    """What scores.json holds. Each dict is by the name of the score; a model that was not scored has none.

    rows: answers that were scored; 0 where there was no test split. model: what "tuned" is, the adapter on the base
    that it was trained on, or final_model/ beside an unquantised base.
    """

    rows: int
    general: GeneralLoss
    model: Literal["adapter", "final"]
    language: str
    base: dict[str, ScoreEntry]
    tuned: dict[str, ScoreEntry]
    p_value: dict[str, float]
    no_p_value: dict[str, str]  # why there is none
    higher_is_better: dict[str, bool | None]


class Metric(Protocol):
    """A module of metrics/, by the contract above. score_of: only with "row_statistics"."""

    features: Mapping[str, Any]
    higher_is_better: bool | None
    compute: Callable[..., dict[str, Any]]
    _compute: Callable[..., dict[str, Any]]
    score_of: Callable[[np.ndarray], dict[str, np.ndarray]]


def language_of(references: Iterable[str]) -> str:
    """The language that decides a file's tokens, from the letters of its references: the first that holds of

    th: 30 % or more are Thai; ja: 30 % or more are Han or kana, and 10 % or more of these are kana; zh: 30 % or more
    are Han or kana; other. Not half, because a Han letter says as much as several Latin ones. Each reference counts as
    much as any other, for the same reason: of ten answers in two languages the four Chinese ones are the shortest.

    >>> [language_of([text]) for text in ("Hello, 世界", "你好，Tom", "漢字とかな", "สวัสดี OK")]
    ['other', 'zh', 'ja', 'th']
    >>> language_of(["An answer of many letters", "another one", "你好"])
    'zh'
    """
    shares, han_letters, kana_letters = [], 0, 0
    for text in references:
        han, kana, thai, letters = (len(script.findall(text)) for script in (HAN, KANA, THAI, LETTER))
        han_letters, kana_letters = han_letters + han, kana_letters + kana
        if letters:
            shares.append((thai / letters, (han + kana) / letters))
    thai_share, han_or_kana_share = np.mean(shares or [(0.0, 0.0)], axis=0)
    if thai_share >= 0.3:
        return "th"
    if han_or_kana_share >= 0.3:
        return "ja" if kana_letters >= 0.1 * (han_letters + kana_letters) else "zh"
    return "other"


def metric_names(folder: Path = FOLDER) -> list[str]:
    """The metrics there are; loads none of them."""
    return sorted(path.stem for path in folder.glob("*/*.py") if path.stem == path.parent.name)


def load_metric(name: str, folder: Path = FOLDER) -> Metric:
    """The `evaluate` module metrics/NAME/NAME.py, from any working directory and without a network.

    Raises: RecipeError: there is no such metric.
    """
    known = metric_names(folder)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise RecipeError(f"unknown metric '{name}'; {hint}there are {', '.join(known)}")
    import evaluate  # seconds, which --help must not wait for

    # evaluate makes a folder for tables on disk; ours stay in memory, so it can go at once.
    with tempfile.TemporaryDirectory() as tables:
        return evaluate.load(str(folder.resolve() / name), keep_in_memory=True, cache_dir=tables)


def row_weights(units: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row occurs in each resample; units: (rows,), rows of the same unit are drawn together."""
    distinct, unit_of_row = np.unique(units, return_inverse=True)
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = rng.integers(len(distinct), size=len(distinct))
        yield np.bincount(drawn, minlength=len(distinct))[unit_of_row]


@dataclass
class Measurement:
    """One metric on one model's answers: its scores and, for each name, those of the resamples, (resamples,)."""

    scores: dict[str, float | None]
    signature: str = ""
    reason: str = "the score is not a finite number"
    resampled: dict[str, np.ndarray] = field(default_factory=dict)

    def entry(self, name: str) -> ScoreEntry:
        if self.scores[name] is None:
            return {"score": None, "reason": self.reason}
        draws = self.resampled[name]
        low, high = np.percentile(draws[np.isfinite(draws)], [2.5, 97.5]).tolist()
        return {"score": self.scores[name], "low": low, "high": high, "signature": self.signature}


def takes_language(module: Metric) -> bool:
    return "language" in inspect.signature(module._compute).parameters


def measure(metric: str, module: Metric, columns: Columns, language: str, weights: Iterable[np.ndarray]) -> Measurement:
    """The scores on all rows, and on the resamples in which `weights` says how often each row occurs."""
    missing = [name for name in module.features if name not in columns]
    if missing:
        return Measurement({metric: None}, reason=f"the answers come without {', '.join(missing)}")
    inputs = {name: columns[name] for name in module.features}
    options = {"language": language} if takes_language(module) else {}

    def compute(rows: np.ndarray) -> dict[str, Any]:
        return module._compute(**{name: [values[row] for row in rows] for name, values in inputs.items()}, **options)

    result = module.compute(**inputs, **options)
    statistics = result.pop("row_statistics", None)
    signature_or_reason = {key: result.pop(key) for key in ("signature", "reason") if key in result}
    measurement = Measurement({name: _finite(score) for name, score in result.items()}, **signature_or_reason)
    if any(score is not None for score in measurement.scores.values()):
        with np.errstate(all="ignore"):  # a resample may lack the very rows that its score needs
            if statistics is not None:
                measurement.resampled = module.score_of(np.stack([weight @ statistics for weight in weights]))
            else:
                results = [compute(np.repeat(np.arange(len(weight)), weight)) for weight in weights]
                measurement.resampled = {name: np.array([each[name] for each in results], float) for name in result}
    return measurement


def _finite(score: Any) -> float | None:
    return float(score) if score is not None and np.isfinite(score) else None


def compare(name: str, base: Measurement, tuned: Measurement, higher_is_better: bool | None, units: int) -> float | str:
    """The paired bootstrap p-value of one score, or why there is none; base and tuned share their resamples.

    Two-sided, (1 + c) / (1 + n) over n resamples, where d is tuned - base on all rows and c is how many resamples have
    a tuned - base that lies at least as far from d as d lies from 0. At least 1 / (1 + n); 1 where nothing differs.
    """
    base_score, tuned_score = base.scores.get(name), tuned.scores[name]
    if higher_is_better is None:
        return "neither more nor less of it is better"
    if base_score is None or tuned_score is None:
        return f"no score: {(base if base_score is None else tuned).reason}"
    if units < MIN_UNITS_FOR_P:
        return f"it takes {MIN_UNITS_FOR_P} rows or conversations, there are {units}"
    observed, differences = tuned_score - base_score, tuned.resampled[name] - base.resampled[name]
    differences = differences[np.isfinite(differences)]
    return float(1 + np.sum(np.abs(differences - observed) >= abs(observed))) / (1 + len(differences))


def score_answers(
    references: Sequence[str],
    base: Columns | None = None,
    tuned: Columns | None = None,
    metrics: Sequence[str] = ("bleu", "chrf", "rouge"),
    language: str | None = None,
    conversations: Sequence[int | str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    folder: Path = FOLDER,
) -> Scores:
    """The scores of one model, or of two, on the same references.

    base, tuned: that model's answers and whatever else the metrics need.
    language: one of LANGUAGES; None: language_of(references).
    conversations: which conversation each row is a turn of; its turns are drawn together. None: each row is its own.

    Raises: RecipeError: no such metric or language.
    """
    if language is not None and language not in LANGUAGES:
        raise RecipeError(f"unknown language '{language}'; there are {', '.join(LANGUAGES)}")
    chosen_by = "script" if language is None else "recipe"
    language = language or language_of(references)
    units = np.arange(len(references)) if conversations is None else np.asarray(conversations)
    answers: dict[ModelName, Columns] = {}
    scores: Scores = {"rows": len(references), "language": language}
    if base is not None:
        answers["base"], scores["base"] = base, {}
    if tuned is not None:
        answers["tuned"], scores["tuned"] = tuned, {}
    scores |= {"p_value": {}, "no_p_value": {}, "higher_is_better": {}}
    for metric in metrics:
        module = load_metric(metric, folder)
        settings = f"|bs:{resamples}|seed:{seed}"
        settings += f"|language:{language}|chosen-by:{chosen_by}" if takes_language(module) else ""
        measurements = {}
        for model, columns in answers.items():
            weights = row_weights(units, resamples, seed)
            measurement = measure(metric, module, {**columns, "references": references}, language, weights)
            measurement.signature += settings
            measurements[model] = measurement
        _enter(scores, measurements, module.higher_is_better, units=len(np.unique(units)))
    return scores


def _enter(
    scores: Scores, measurements: dict[ModelName, Measurement], higher_is_better: bool | None, units: int
) -> None:
    """Puts what one metric gave into `scores`."""
    for model, measurement in measurements.items():
        for name in measurement.scores:
            scores[model][name] = measurement.entry(name)
            scores["higher_is_better"][name] = higher_is_better
    if len(measurements) == 2:
        for name in measurements["tuned"].scores:
            p = compare(name, measurements["base"], measurements["tuned"], higher_is_better, units)
            if isinstance(p, str):
                scores["no_p_value"][name] = p
            else:
                scores["p_value"][name] = p


def row_scores(
    metric: str, references: Sequence[str], answers: Columns, language: str | None = None, folder: Path = FOLDER
) -> dict[str, np.ndarray]:
    """Each row's score as if it were the whole file, {name: (rows,)}; not a number where that cannot be computed."""
    module, columns = load_metric(metric, folder), {**answers, "references": references}
    each_row = (np.arange(len(references)) == row for row in range(len(references)))
    return measure(metric, module, columns, language or language_of(references), each_row).resampled
