"""What the page tells to do next, by the run's own figures."""

from pathlib import Path

import pytest

from sft.results.advice import advice
from sft.results.run_folder import Run
from sft.results.words import ScoreRow


def told(losses=(), scores=(), ended=None, folder=Path("nowhere"), **training_args):
    log = [{"step": 10 * i, "eval_loss": loss} for i, loss in enumerate(losses)]
    rows = [ScoreRow(name, "higher is better", None, None, outcome, "", "") for name, outcome in scores]
    tuned = {} if ended is None else {"stop_rate": {"score": ended}}
    config = {"recipe": {"training_args": training_args}}
    return advice(Run(folder, config, None, {"log_history": log}, {"rows": 38, "tuned": tuned}, None), rows)


@pytest.mark.parametrize(
    ("given", "beginnings"),
    [
        ({}, []),
        ({"losses": [3, 2, 2.5]}, ["The validation loss was lowest at step 10 (2) and rose to 2.5: train for fewer"]),
        ({"losses": [3, 2, 2.03]}, []),
        ({"losses": [3, 2, 2.5], "load_best_model_at_end": True}, []),
        ({"losses": [3, 2, 1.5]}, ["The validation loss was still falling at the end (1.5): more epochs may help."]),
        ({"losses": [3, 2]}, []),
        ({"scores": [("chrf", "worse"), ("bleu", "better")]}, ["Worse by chrf: read the replies that improved least"]),
        ({"scores": [("chrf", "better")]}, []),
        ({"scores": [("chrf", "")]}, ["No score changed clearly on 38 answers"]),
        ({"ended": 70.0}, ["30 % of the answers were cut off: raise evaluation.generation.max_new_tokens"]),
        ({"ended": 95.0}, []),
    ],
)
def test_advice_is_what_the_figures_say(given, beginnings):
    found = told(**given)
    assert len(found) == len(beginnings)
    assert [sentence[: len(start)] for sentence, start in zip(found, beginnings, strict=True)] == beginnings


def test_a_merged_model_can_be_talked_to(tmp_path):
    (tmp_path / "final_model").mkdir()
    assert told(folder=tmp_path) == [
        "Talk to it: transformers serve final_model, in this page's folder; docs/serving.md has other servers."
    ]
