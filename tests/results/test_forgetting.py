"""The forgetting meter: what is computed, on which model, and the words for it."""

import json
import math

import pytest
import torch

import run_sft
from sft.data.conversation import Conversation
from sft.results.answers import generation_mode, list_turns
from sft.results.evaluation import EvaluatedModel, evaluate_models, reference_losses
from sft.results.forgetting import general_line, general_loss, has_forgotten
from sft.results.page import write_report
from sft.results.summary import run_summary
from tests.results.chatters import CONVERSATIONS, assistant, chatglm3_chatter, predictions, recipe_in, user, with_lora
from tests.results.runs import Page, scores_of, write_run
from tests.results.runs import predictions as written_predictions
from tests.test_run import ROOT

GENERAL = [(place.replace("test", "general"), conversation) for place, conversation in CONVERSATIONS[2:6]]


def measured(before, after, low, high):
    entries = {"base": before, "tuned": after, "difference": after - before}
    ends = {"difference": {"low": low, "high": high}}
    losses = {name: {"score": score, "low": 0.0, "high": 9.0} | ends.get(name, {}) for name, score in entries.items()}
    return {"rows": 86, "left_out": 0, "tokens": 5000} | losses


def test_the_loss_is_a_mean_over_tokens_and_its_interval_draws_whole_rows():
    places = ["g:1", "g:1", "g:2"]  # two answers of one row, which are drawn together
    base = {"loss_sum": [2.0, 4.0, 30.0], "tokens": [1, 2, 7]}
    tuned = {"loss_sum": [4.0, 6.0, 44.0], "tokens": [1, 2, 7]}
    found = general_loss(places, {"base": base, "tuned": tuned}, left_out=5)
    assert (found["rows"], found["left_out"], found["tokens"]) == (2, 5, 10)
    # Of two rows a resample is the first twice, 6 / 3, the second twice, 30 / 7, or both, 36 / 10.
    assert found["base"] == {"score": 3.6, "low": 2.0, "high": round(30 / 7, 4)}
    # The difference is paired: 4 / 3, 14 / 7 or 18 / 10, though the two losses spread from 2 to 6.3.
    assert found["difference"] == {"score": 1.8, "low": round(4 / 3, 4), "high": 2.0}


@pytest.mark.parametrize(
    ("general", "verdict", "is_told"),
    [
        (measured(2.0, 2.4, 0.3, 0.5), "(+0.40, 95 % 0.30 to 0.50): worse than before", True),
        (measured(2.0, 2.05, 0.02, 0.08), "(+0.05, 95 % 0.02 to 0.08): slightly worse", False),
        (measured(2.0, 2.4, -0.1, 0.9), "(+0.40, 95 % -0.10 to 0.90): no clear change", False),
        (measured(2.0, 1.8, -0.3, -0.1), "(-0.20, 95 % -0.30 to -0.10): not worse", False),
    ],
)
def test_words_follow_the_interval_and_the_size(general, verdict, is_told):
    assert general_line(general).endswith(verdict)
    assert has_forgotten(general) == is_told


def evaluate(chatter, folder, conversations, *overrides, general=GENERAL):
    tuned = with_lora(chatter.model)
    models = [EvaluatedModel("base", tuned, False, "base"), EvaluatedModel("tuned", tuned, True, "adapter")]
    return evaluate_models(recipe_in(folder, *overrides), chatter.encoder, conversations, models, general)


def test_before_is_the_model_with_its_adapter_off_and_after_with_it_on(llama, tmp_path):
    scores = evaluate(llama, tmp_path, CONVERSATIONS[:2])
    assert scores["rows"] == 2 and scores["general"]["rows"] == 4
    turns = list_turns(GENERAL, llama.encoder)
    for name, model in (("base", llama.model), ("tuned", with_lora(llama.model))):
        with generation_mode(model, True):
            losses = reference_losses(model, llama.encoder, turns, 1)
        expected = math.fsum(losses["loss_sum"]) / sum(losses["tokens"])
        assert scores["general"][name]["score"] == pytest.approx(expected, abs=1e-4)
    assert scores["general"]["base"] != scores["general"]["tuned"]
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["general"] == scores["general"]
    assert all("general" not in row["row"] for row in predictions(tmp_path)), "no answers are generated for these"


def test_without_a_test_split_the_loss_alone_is_measured(llama, tmp_path):
    scores = evaluate(llama, tmp_path, [])
    assert scores["rows"] == 0 and scores["general"]["rows"] == 4 and "chrf" not in scores.get("base", {})
    assert not (tmp_path / "predictions.jsonl").exists()


def test_rows_that_the_tokenizer_cannot_take_are_counted(llama, tmp_path):
    spelled = ("general.jsonl:9", Conversation([user("Hi."), assistant("<|im_end|>")]))
    found = evaluate(llama, tmp_path / "some", [], general=[*GENERAL, spelled])["general"]
    assert (found["rows"], found["left_out"]) == (4, 1)
    found = evaluate(llama, tmp_path / "none", [], general=[spelled])["general"]
    assert found == {"rows": 0, "left_out": 1}
    assert general_line(found) == "general text: not measured, the tokenizer cannot take it"


def test_a_model_alone_has_a_loss_and_no_difference_also_chatglm3(tmp_path):
    chatter = chatglm3_chatter(tmp_path)
    models = [EvaluatedModel("base", chatter.model, True, "base")]
    found = evaluate_models(recipe_in(tmp_path / "run"), chatter.encoder, [], models, GENERAL)["general"]
    assert found["rows"] == 4 and "difference" not in found and not has_forgotten(found)
    assert general_line(found) == f"general text: loss {found['base']['score']:.2f}"


def test_max_samples_counts_general_rows_too(llama, tmp_path):
    assert evaluate(llama, tmp_path, [], "evaluation.max_samples=3")["general"]["rows"] == 3


def test_page_and_summary_say_it_and_what_to_do(tmp_path):
    rows = written_predictions()
    folder = write_run(tmp_path, scores=scores_of(rows) | {"general": measured(2.31, 2.64, 0.28, 0.39)})
    said = "eneral text: loss 2.31 -> 2.64 (+0.33, 95 % 0.28 to 0.39): worse than before"
    page = Page(write_report(folder)).words
    assert f"G{said}." in page and "The loss on general text rose by 0.33: try fewer epochs" in page
    assert f"\ng{said}\n\n" in run_summary(folder)
    folder = write_run(tmp_path, scores={"rows": 0, "general": measured(2.31, 2.33, 0.01, 0.04)})
    page = Page(write_report(folder)).words
    assert "There are no scores (no test split)." in page and "general text rose" not in page
    assert "slightly worse" in page and "slightly worse" in run_summary(folder)


def test_a_lora_run_without_a_test_split_measures_it_and_says_that_no_answers_are_scored(small_qwen, tmp_path, capfd):
    settings = {
        "model_name_or_path": small_qwen,
        "output_dir": tmp_path / "out",
        "dataset.train": ROOT / "data/demo/validation.jsonl",
        "dataset.validation": "null",
        "dataset.test": "null",
        "dataset.max_length": 640,
        "model_init.dtype": "float32",
        "evaluation.max_samples": 4,
        "training_args.max_steps": 2,
        "training_args.learning_rate": 0.05,
        "lora_config.target_modules": "[q_proj, v_proj]",
        "lora_config.layers_to_transform": "null",
        "export.merge": "false",
    }
    recipe = str(ROOT / "recipes/smollm2_cpu.yaml")
    assert run_sft.main([recipe, *(f"{key}={value}" for key, value in settings.items())]) == 0
    printed = capfd.readouterr().out
    assert "no dataset.test: no answers will be scored" in printed and "\ngeneral text: loss " in printed
    scores = json.loads((tmp_path / "out/scores.json").read_text(encoding="utf-8"))
    assert set(scores) == {"rows", "general", "model"} and scores["general"]["rows"] == 4
    assert scores["general"]["base"]["score"] != scores["general"]["tuned"]["score"]
    assert not torch.is_inference_mode_enabled()
