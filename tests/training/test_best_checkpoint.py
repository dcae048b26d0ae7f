"""Scores of answers while training, the best checkpoint by them, and early stopping."""

import json

import pytest
import torch
from safetensors.torch import load_file

import run_sft
from sft.errors import RecipeError
from sft.recipe import load_recipe
from sft.results.curves import plots, score_curves
from sft.results.during import more_is_better, score_directions
from tests.test_methods import cut_off, log, recipe_of, trained

LORA = "lora_config={r: 4, lora_dropout: 0.1, target_modules: [q_proj, v_proj]}"
VALIDATED = ["training_args.eval_strategy=steps", "training_args.eval_steps=1", "training_args.save_steps=1"]
EVERY = ["training_args.eval_strategy=null", "training_args.save_steps=1", "evaluation.every=1"]
FEW = "evaluation.during_samples=2"


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def values(history, key):
    return {entry["step"]: entry[key] for entry in history if key in entry}


@pytest.fixture(scope="module")
def by_chrf(small_qwen, tmp_path_factory):
    """A run that takes the checkpoint with the best chrF, its answers drawn at random."""
    folder = tmp_path_factory.mktemp("by_chrf")
    options = [LORA, *EVERY, FEW, "evaluation.generation={do_sample: true, max_new_tokens: 6}", "export.merge=false"]
    options += ["training_args.load_best_model_at_end=true", "training_args.metric_for_best_model=chrf"]
    options += ["evaluation.metrics=[chrf, perplexity]"]
    out, _, trainer = trained(small_qwen, folder, *options, scored=False)
    return out, options, trainer


def test_answers_are_scored_at_every_validation_and_the_best_checkpoint_by_them_is_taken(by_chrf):
    out, _, trainer = by_chrf
    history, state = log(out), json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))
    chrf = values(history, "eval_chrf")
    assert list(chrf) == list(values(history, "eval_loss")) == [1, 2, 3, 4]
    assert len(set(chrf.values())) > 1
    best = max(chrf, key=lambda step: chrf[step])
    assert state["best_metric"] == chrf[best] and state["best_global_step"] == best
    assert trainer.args.greater_is_better is True
    assert equal(adapter(out / "lora_adapter"), adapter(out / f"checkpoint-{best}"))
    assert list(score_curves(state["log_history"])) == ["chrf", "perplexity"]
    titles = [plot.title for plot in plots(state["log_history"])]
    assert titles[3:] == ["chrf, answers to validation rows", "perplexity, answers to validation rows"]


def test_answers_leave_training_as_it_is_and_it_resumes_bit_for_bit(by_chrf, small_qwen, tmp_path):
    out, options, trainer = by_chrf
    plain, _, _ = trained(small_qwen, tmp_path, LORA, *VALIDATED, "export.merge=false", scored=False)
    history = log(out)
    assert equal(adapter(out / "checkpoint-4"), adapter(plain / "checkpoint-4"))
    assert values(history, "eval_loss") == values(log(plain), "eval_loss")
    before = adapter(out / "checkpoint-4")
    cut_off(out, 2)
    trained(small_qwen, out.parent, *options, scored=False)
    assert log(out) == history
    assert equal(adapter(out / "checkpoint-4"), before)


def test_without_gain_training_stops_early_also_when_it_goes_on(small_qwen, tmp_path, capfd):
    options = [LORA, "training_args.learning_rate=0", "training_args.eval_strategy=steps", "training_args.eval_steps=1"]
    options += ["training_args.save_steps=null", "early_stopping={early_stopping_patience: 2}", "export.merge=false"]
    out, _, _ = trained(small_qwen, tmp_path, *options, scored=False)
    history = log(out)
    assert list(values(history, "eval_loss")) == [1, 2, 3]  # the first is the best, and two are no better
    cut_off(out, 2)
    trained(small_qwen, tmp_path, *options, scored=False)
    assert log(out) == history
    capfd.readouterr()
    trained(small_qwen, tmp_path, *options, scored=False)
    assert "training is finished: taking up" in capfd.readouterr().out
    assert log(out) == history


def test_a_metric_says_whether_more_of_it_is_better():
    assert score_directions(["chrf", "rouge", "perplexity", "length_ratio"]) == {
        "chrf": True, "rouge1": True, "rouge2": True, "rougeL": True, "perplexity": False, "length_ratio": None,
    }  # fmt: skip


@pytest.mark.parametrize(("overrides", "told"), [
    (["training_args.metric_for_best_model=chrF"], "there is no score chrF; by evaluation.metrics there are loss"),
    (["training_args.metric_for_best_model=length_ratio", "evaluation.metrics=[length_ratio]"],
     "neither more nor less of length_ratio is better; choose another score"),
])  # fmt: skip
def test_a_best_checkpoint_by_what_is_no_score_is_told_before_training(small_qwen, tmp_path, overrides, told):
    with pytest.raises(RecipeError, match=told):
        more_is_better(recipe_of(small_qwen, tmp_path, *EVERY, *overrides))
    lower = recipe_of(small_qwen, tmp_path, *EVERY, "evaluation.metrics=[perplexity]",
                      "training_args.metric_for_best_model=perplexity")  # fmt: skip
    assert more_is_better(lower) is False


@pytest.mark.parametrize(("overrides", "told"), [
    (["evaluation.every=2", "dataset.validation=null"], "needs dataset.validation; give a file"),
    (["early_stopping={}", "dataset.validation=null"], "needs dataset.validation; give a file"),
    (["evaluation.every=2"], "training_args.eval_strategy: is 'no', and evaluation.every sets steps; take one out"),
    (["evaluation.every=2", "training_args.eval_strategy=steps", "training_args.eval_steps=3"],
     "is 3, and evaluation.every sets 2; take one out"),
    (["training_args.metric_for_best_model=chrf"], "'chrf' is a score of answers, which are given while training with"),
    (["early_stopping={}"], "eval_strategy: 'no' validates nothing to choose a checkpoint by; give steps or epoch"),
    (["early_stopping={patience: 1}"], "unknown key early_stopping.patience; the keys here are early_st"),
    (["training_args.early_stopping_patience=1"], "belongs in early_stopping"),
])  # fmt: skip
def test_what_does_not_go_together_is_told_from_the_recipe_alone(tmp_path, overrides, told):
    with pytest.raises(RecipeError, match=told):
        recipe_of("m", tmp_path, *overrides)


def test_what_the_best_checkpoint_asks_for_is_set_and_survives_a_round_trip(tmp_path):
    recipe = recipe_of("m", tmp_path, *EVERY, "training_args.save_steps=null", "early_stopping={}")
    args = recipe.training_args
    assert (args["eval_strategy"], args["eval_steps"], args["save_strategy"], args["save_steps"]) == ("steps", 1) * 2
    assert args["load_best_model_at_end"] is True and args["metric_for_best_model"] == "eval_loss"
    (tmp_path / "again.yaml").write_text(json.dumps(recipe.to_dict()), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert run_sft.main([str(tmp_path / "again.yaml"), "early_stopping.early_stopping_patience=0", "--check"]) == 2
