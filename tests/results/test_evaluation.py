"""Evaluations of tiny random models: what goes to disk, what is taken up again, and the losses on the references."""

import json

import pytest
import torch

import sft.results.answers
import sft.results.evaluation
from sft.data.conversation import Conversation
from sft.errors import DataError
from sft.recipe import ChatOptions
from sft.results.answers import generation_mode, list_turns
from sft.results.evaluation import EvaluatedModel, evaluate_models, reference_losses
from tests.results.chatters import (
    CONVERSATIONS,
    Killed,
    assistant,
    chatglm3_chatter,
    count_generated,
    greedy,
    predictions,
    random_chatter,
    recipe_in,
    score_alone,
    user,
    with_lora,
)


@pytest.fixture
def cut_off(llama, tmp_path, monkeypatch):
    """A scoring killed in its second batch, with the line it was writing cut in a character, and one answer marked."""
    straight = tmp_path / "straight"
    score_alone(llama, straight)
    folder, calls = tmp_path / "killed", []

    def killed_in_batch_three(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise Killed
        return generate(*arguments)

    generate = sft.results.answers.generate
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sft.results.answers, "generate", killed_in_batch_three)
        score_alone(llama, folder)
    working = folder / "predictions.partial.jsonl"
    lines = working.read_text(encoding="utf-8").split("\n")
    assert len(lines) == 1 + 6 + 1 and lines[-1] == "", "their provenance, two batches of three, no half line"
    marked = json.loads(lines[2])
    marked["text"] = "kept\u2028\x85 as it was 🖎"
    lines[2] = json.dumps(marked, ensure_ascii=False)
    whole = "\n".join(lines[:-1]).encode()
    working.write_bytes(whole + b'\n{"model": "base", "key": "test.jsonl:9#1", "text": "\xf0\x9f')
    return folder, straight, marked


def test_a_scoring_that_was_cut_off_loses_no_whole_answer_and_goes_on(llama, cut_off, monkeypatch):
    folder, straight, marked = cut_off
    generated = count_generated(monkeypatch)
    score_alone(llama, folder)
    assert sum(generated) == 11 - 6, "eleven turns, six of them on disk"
    for found, expected in zip(predictions(folder), predictions(straight), strict=True):
        if f"{found['row']}#{found['turn']}" == marked["key"]:
            assert found["base"] == marked["text"]
        else:
            assert found == expected
    assert not (folder / "predictions.partial.jsonl").exists()


@pytest.mark.parametrize("other", ["weights", "generation", "prompts", "dtype"])
def test_answers_of_another_provenance_are_not_taken_up(llama, cut_off, monkeypatch, other):
    folder, _, marked = cut_off
    generated = count_generated(monkeypatch)
    conversations = CONVERSATIONS[:-1] if other == "prompts" else CONVERSATIONS
    overrides = {"generation": ["evaluation.generation.repetition_penalty=1.3"], "dtype": ["model_init.dtype=float32"]}
    provenance = "others" if other == "weights" else "base weights"
    score_alone(llama, folder, *overrides.get(other, []), conversations=conversations, provenance=provenance)
    assert sum(generated) == (10 if other == "prompts" else 11)
    assert marked["text"] not in [prediction["base"] for prediction in predictions(folder)]


@pytest.mark.parametrize("change", ["evaluation.metrics=[bleu]", "evaluation.batch_size=2", "evaluation.language=zh"])
def test_answers_are_taken_up_where_only_their_scoring_changed(llama, cut_off, monkeypatch, change):
    generated = count_generated(monkeypatch)
    score_alone(llama, cut_off[0], change)
    assert sum(generated) == 11 - 6


def test_a_batch_that_does_not_fit_the_memory_is_halved(llama, tmp_path, monkeypatch):
    sizes, generate = [], sft.results.answers.generate

    def small(model, encoder, prompts, config):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return generate(model, encoder, prompts, config)

    score_alone(llama, tmp_path / "straight")
    monkeypatch.setattr(sft.results.answers, "generate", small)
    score_alone(llama, tmp_path / "small", "evaluation.batch_size=8")
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1]
    assert predictions(tmp_path / "small") == predictions(tmp_path / "straight")


def test_with_the_adapter_off_the_base_answers(llama, tmp_path):
    score_alone(llama, tmp_path / "plain", "evaluation.metrics=[perplexity]")
    tuned = with_lora(llama.model)
    models = [EvaluatedModel("base", tuned, False, "base"), EvaluatedModel("tuned", tuned, True, "adapter")]
    recipe = recipe_in(tmp_path / "lora", "evaluation.metrics=[perplexity]")
    scores = evaluate_models(recipe, llama.encoder, CONVERSATIONS, models)
    both, plain = predictions(tmp_path / "lora"), predictions(tmp_path / "plain")
    assert [row["base"] for row in both] == [row["base"] for row in plain]
    assert [row["tuned"] for row in both] != [row["base"] for row in both]
    alone = json.loads((tmp_path / "plain/scores.json").read_text(encoding="utf-8"))
    assert scores["base"]["perplexity"]["score"] == pytest.approx(alone["base"]["perplexity"]["score"], rel=1e-5)
    assert scores["tuned"]["perplexity"]["score"] != pytest.approx(scores["base"]["perplexity"]["score"], rel=1e-3)


@pytest.mark.parametrize(("batch_size", "logit_rows"), [(1, 4096), (3, 4096), (16, 130)])
@pytest.mark.parametrize("name", ["smollm2", "chatglm3"])
def test_reference_losses_are_those_of_transformers_on_the_same_labels(
    name, batch_size, logit_rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(sft.results.evaluation, "LOGIT_ROWS", logit_rows)
    chatter = chatglm3_chatter(tmp_path) if name == "chatglm3" else random_chatter(name)
    turns = list_turns(CONVERSATIONS, chatter.encoder)
    with generation_mode(chatter.model, True):
        found = reference_losses(chatter.model, chatter.encoder, turns, batch_size)
    for i, turn in enumerate(turns):
        encoded = chatter.encoder.encode(turn.conversation.messages)
        start, stop = encoded.turns[(turn.number - 1) // 2]
        ids = torch.tensor([list(encoded.input_ids)])
        labels = torch.full_like(ids, -100)
        labels[0, start:stop] = ids[0, start:stop]
        with torch.no_grad():
            output = chatter.model(input_ids=ids, labels=labels)
        right = (output.logits[0, start - 1 : stop - 1].argmax(-1) == ids[0, start:stop]).sum()
        assert found["tokens"][i] == stop - start > 1
        assert found["loss_sum"][i] / found["tokens"][i] == pytest.approx(output.loss.item(), rel=1e-5)
        assert found["correct"][i] == right


def test_perplexity_weighs_every_token_the_same(llama, tmp_path):
    metrics = "evaluation.metrics=[perplexity, token_accuracy, stop_rate]"
    scores = score_alone(llama, tmp_path, metrics)["base"]
    turns = list_turns(CONVERSATIONS, llama.encoder)
    with generation_mode(llama.model, True):
        losses = reference_losses(llama.model, llama.encoder, turns, 1)
    mean = torch.tensor(losses["loss_sum"], dtype=torch.float64).sum() / sum(losses["tokens"])
    assert scores["perplexity"]["score"] == pytest.approx(mean.exp().item(), rel=1e-5)
    accuracy = 100 * sum(losses["correct"]) / sum(losses["tokens"])
    assert scores["token_accuracy"]["score"] == pytest.approx(accuracy)
    finished = [greedy(llama, turn.prompt, llama.stops)[1] for turn in turns]
    assert scores["stop_rate"]["score"] == pytest.approx(100 * sum(finished) / len(finished))


def test_predictions_and_scores_have_the_form_of_the_design(llama, tmp_path):
    tuned = with_lora(llama.model)
    models = [EvaluatedModel("base", tuned, False, "base"), EvaluatedModel("tuned", tuned, True, "adapter")]
    evaluate_models(recipe_in(tmp_path), llama.encoder, CONVERSATIONS, models)
    rows = predictions(tmp_path)
    assert [(row["row"], row["turn"]) for row in rows][3:7] == [
        ("test.jsonl:4", 1),
        ("test.jsonl:5", 1),
        ("test.jsonl:5", 3),
        ("test.jsonl:6", 1),
    ]
    assert all(list(row) == ["row", "turn", "messages", "reference", "base", "tuned"] for row in rows)
    assert rows[5]["messages"] == CONVERSATIONS[4][1].messages[:3]
    assert rows[5]["reference"] == "I count the storms."
    assert all(isinstance(row[name], str) for row in rows for name in ("base", "tuned"))
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert scores["rows"] == 11
    assert {"base", "tuned", "p_value"} <= scores.keys()
    for model in ("base", "tuned"):
        assert list(scores[model]) == ["chrf"]
        assert list(scores[model]["chrf"]) == ["score", "low", "high", "signature"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.jsonl", "recipe.yaml", "scores.json"]


def test_max_samples_counts_rows_of_the_test_split(llama, tmp_path):
    assert score_alone(llama, tmp_path, "evaluation.max_samples=5")["rows"] == 6
    assert {row["row"] for row in predictions(tmp_path)} == {f"test.jsonl:{i}" for i in range(1, 6)}


def test_a_test_split_without_an_answer_is_an_error(llama, tmp_path):
    with pytest.raises(DataError, match="no assistant turn to score"):
        score_alone(llama, tmp_path, conversations=[("a.jsonl:1", Conversation([user("Hello")]))])


def test_sampling_with_stop_strings_is_what_the_recipe_may_ask_for(llama, tmp_path):
    sampling = ["evaluation.generation.do_sample=true", "evaluation.generation.stop_strings=[the]"]
    assert score_alone(llama, tmp_path, *sampling)["rows"] == 11


@pytest.mark.parametrize("mode", ["whole", "each_answer"])
def test_reference_losses_are_of_the_examples_that_are_trained(mode):
    """Qwen3 writes its <think> block into a last answer only."""
    chatter = random_chatter("qwen3")
    conversation = Conversation([user("Hello"), assistant("the pier"), user("And you?"), assistant("I count.")])
    (first, second) = list_turns([("a:1", conversation)], chatter.encoder)
    with generation_mode(chatter.model, True):
        losses = reference_losses(chatter.model, chatter.encoder, [first, second], 2, ChatOptions(examples=mode))
        for i, turn in enumerate((first, second)):
            ended = turn.conversation.messages[: turn.number + 1] if mode == "each_answer" else conversation.messages
            encoded = chatter.encoder.encode(ended)
            start, stop = encoded.turns[-1] if mode == "each_answer" else encoded.turns[i]
            if mode == "each_answer":
                assert turn.prompt == list(encoded.input_ids[:start])
            labels = torch.full((1, len(encoded.input_ids)), -100)
            labels[0, start:stop] = torch.tensor(encoded.input_ids[start:stop])
            mean = chatter.model(input_ids=torch.tensor([encoded.input_ids]), labels=labels).loss
            assert losses["tokens"][i] == stop - start
            assert losses["loss_sum"][i] == pytest.approx(mean.item() * (stop - start), rel=1e-4)
