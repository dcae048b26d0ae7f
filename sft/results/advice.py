"""What a run's own figures say to do next."""

from collections.abc import Iterator, Sequence

from sft.results.forgetting import has_forgotten
from sft.results.run_folder import Run
from sft.results.words import ScoreRow, number

NOTICEABLE = 0.02  # share by which a validation loss rises or falls from one validation to another


def advice(run: Run, scores: Sequence[ScoreRow]) -> list[str]:
    """Sentences for the page, the most urgent first. scores: the rows of its table."""
    return [*_of_forgetting(run), *_of_scores(run, scores), *_of_validation(run), *_of_use(run)]


def _of_forgetting(run: Run) -> Iterator[str]:
    general = (run.scores or {}).get("general")
    if general and has_forgotten(general):
        yield (
            f"The loss on general text rose by {general['difference']['score']:.2f}: try fewer epochs or a smaller "
            "learning rate, or mix general rows, other than those of evaluation.general, in by dataset.train with a "
            "weight."
        )


def _of_scores(run: Run, scores: Sequence[ScoreRow]) -> Iterator[str]:
    if worse := [row.name for row in scores if row.outcome == "worse"]:
        yield (
            f"Worse by {', '.join(worse)}: read the replies that improved least, and try half the learning rate or "
            "fewer epochs."
        )
    tuned = (run.scores or {}).get("tuned") or {}
    ended = (tuned.get("stop_rate") or {}).get("score")
    if ended is not None and ended < 90:
        yield (
            f"{100 - ended:.0f} % of the answers were cut off: raise evaluation.generation.max_new_tokens; if they "
            "still do not end, train longer."
        )
    if scores and not any(row.outcome for row in scores):
        answers = f"{(run.scores or {}).get('rows', 0):,} answers"
        yield f"No score changed clearly on {answers}: a larger test split tells more."


def _of_validation(run: Run) -> Iterator[str]:
    losses = [(entry["step"], entry["eval_loss"]) for entry in run.log if "eval_loss" in entry]
    if len(losses) < 3:
        return
    (before, (_, last)), (step, lowest) = losses[-2:], min(losses, key=lambda each: each[1])
    keeps_best = (run.recipe.get("training_args") or {}).get("load_best_model_at_end")
    if last > lowest * (1 + NOTICEABLE) and not keeps_best:
        yield (
            f"The validation loss was lowest at step {step:,} ({number(lowest)}) and rose to {number(last)}: train for "
            "fewer epochs, or keep the best checkpoint (training_args.load_best_model_at_end: true)."
        )
    elif last < before[1] * (1 - NOTICEABLE):
        yield f"The validation loss was still falling at the end ({number(last)}): more epochs may help."


def _of_use(run: Run) -> Iterator[str]:
    if (run.folder / "final_model").is_dir():
        yield "Talk to it: transformers serve final_model, in this page's folder; docs/serving.md has other servers."
