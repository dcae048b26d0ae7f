"""Answers and their scores on tiny random models, held against plain loops over plain forward passes."""

import copy
import json
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import run_sft
from sft.data.chat import ChatEncoder
from sft.data.conversation import Conversation
from sft.recipe import load_recipe
from sft.results import answers as scoring
from sft.results.answers import Answers, Turn, answer, for_generation, list_turns, reference_losses, without_thoughts
from tests.families import FAMILIES, build
from tests.test_run import ROOT, run_process

NEW_TOKENS = 16
SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,  # the usual 0.02 leaves a tiny model that writes one token for ever
    "pad_token_id": None,
    "bos_token_id": None,
}
# name: model, configuration, template, kind of tokenizer
RANDOM_MODELS = {
    "smollm2": (LlamaForCausalLM, LlamaConfig, "qwen2_5", "bytes"),  # a Llama that is spoken to in ChatML
    "llama3": (LlamaForCausalLM, LlamaConfig, "llama3", "bytes"),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, "qwen2_5", "bytes"),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, "gemma3", "gemma"),
    "phi3": (Phi3ForCausalLM, Phi3Config, "phi3", "metaspace"),
}


@dataclass
class Chatter:
    model: PreTrainedModel
    encoder: ChatEncoder

    @property
    def stops(self):
        return scoring.stop_ids(self.model, self.encoder)


def random_chatter(name: str) -> Chatter:
    model_class, config_class, template, kind = RANDOM_MODELS[name]
    tokenizer = build(FAMILIES[template], kind)
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    extra = {"head_dim": 8, "sliding_window": 12, "tie_word_embeddings": False} if name == "gemma3" else {}
    eos = tokenizer.eos_token_id
    model = model_class(config_class(vocab_size=len(tokenizer), eos_token_id=eos, **SIZE | extra)).eval()
    return Chatter(model, ChatEncoder(tokenizer))


def chatglm3_chatter(folder: Path) -> Chatter:
    chatglm3_tests = pytest.importorskip("tests.test_chatglm3_tokenizer")
    from tests.test_chatglm3_model import tiny_model
    from transformers import AutoTokenizer

    chatglm3_tests.train(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Chatter(tiny_model(padded_vocab_size=len(tokenizer)), ChatEncoder(tokenizer))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


WORDS = "the crowd on pier counts how are you hello storms what can I do today and one two".split()
CONVERSATIONS = [
    (f"test.jsonl:{i + 1}", Conversation([user(" ".join(WORDS[(i + k) % len(WORDS)] for k in range(length)))]))
    for i, length in enumerate((1, 40, 3, 90, 7, 2, 25, 60, 5, 12))
]
for _place, _conversation in CONVERSATIONS:
    _conversation.messages.append(assistant("Hello, the pier."))
CONVERSATIONS[4][1].messages.extend([user("And you?"), assistant("I count the storms.")])


def greedy(chatter: Chatter, prompt: list[int], stops: set[int], limit: int = NEW_TOKENS) -> tuple[list[int], bool]:
    """One prompt, one forward pass over everything for each token: no batch, no padding, no cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(limit):
            logits = chatter.model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] in stops:
                return ids[len(prompt) : -1], True
    return ids[len(prompt) :], False


def make_it_stop(chatter: Chatter, turns: list[Turn]) -> set[int]:
    """Adds a stop token to the model that ends some of its answers early, and not all."""
    written = [greedy(chatter, turn.prompt, chatter.stops)[0] for turn in turns]
    tokens = sorted({token for row in written for token in row})
    half = min(tokens, key=lambda token: abs(sum(token in row[1:] for row in written) - len(turns) / 2))
    chatter.model.generation_config.eos_token_id = [half]
    return chatter.stops


def answers_of(chatter, turns, path, batch_size, stops, **options):
    config = GenerationConfig(**{"max_new_tokens": NEW_TOKENS, "do_sample": False} | options, eos_token_id=list(stops))
    config.pad_token_id = chatter.encoder.tokenizer.pad_token_id
    answers = Answers(path, {"batch": batch_size})
    with for_generation(chatter.model, True):
        answer(chatter.model, chatter.encoder, turns, answers, "base", config, batch_size)
    answers.close()
    return [(answers.known["base", turn.key]["text"], answers.known["base", turn.key]["finished"]) for turn in turns]


@pytest.mark.parametrize("name", [*RANDOM_MODELS, "chatglm3"])
def test_a_batch_writes_what_each_prompt_gets_alone_cut_at_the_stop_token(name, tmp_path):
    chatter = chatglm3_chatter(tmp_path) if name == "chatglm3" else random_chatter(name)
    turns = list_turns(CONVERSATIONS, chatter.encoder)
    stops = make_it_stop(chatter, turns)
    alone = [greedy(chatter, turn.prompt, stops) for turn in turns]
    expected = [(scoring.written_text(chatter.encoder, ids), finished) for ids, finished in alone]
    assert {finished for _, finished in alone} == {True, False}, "the test needs answers that stop and others"
    assert len({len(ids) for ids, _ in alone}) > 3 and len(set(expected)) > 5
    for batch_size in (4, 16):
        assert answers_of(chatter, turns, tmp_path / f"{batch_size}.jsonl", batch_size, stops) == expected


def test_an_answer_has_no_stop_token_no_padding_and_no_chatglm3_metadata_line(tmp_path):
    chatter = chatglm3_chatter(tmp_path)
    tokenizer = chatter.encoder.tokenizer
    (start, stop), = chatter.encoder.encode([user("Hello"), assistant("the pier")]).turns  # fmt: skip
    ids = chatter.encoder.encode([user("Hello"), assistant("the pier")]).input_ids[start : stop - 1]
    assert tokenizer.decode(ids) != "the pier"
    assert scoring.written_text(chatter.encoder, ids) == "the pier"


@pytest.fixture(scope="module")
def llama():
    chatter = random_chatter("smollm2")
    make_it_stop(chatter, list_turns(CONVERSATIONS, chatter.encoder))
    return chatter


def test_each_assistant_turn_is_asked_with_the_history_as_the_data_has_it(llama):
    messages = [user("Hello"), assistant("Aye."), user("And you?"), assistant("I count the storms.")]
    first, second = list_turns([("a.jsonl:1", Conversation(messages))], llama.encoder)
    text = llama.encoder.tokenizer.decode(second.prompt)
    assert text.endswith(
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nAye.<|im_end|>\n"
        "<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert second.prompt[: len(first.prompt)] == first.prompt
    assert [(turn.number, turn.reference) for turn in (first, second)] == [(1, "Aye."), (3, "I count the storms.")]


def test_the_reference_of_a_tool_call_is_the_text_that_the_model_must_write(llama):
    tools = [{"type": "function", "function": {"name": "tide", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Skerry"}}}
    messages = [
        user("When is high tide?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "tide", "content": "at noon"},
        assistant("At noon."),
    ]
    turns = list_turns([("a.jsonl:1", Conversation(messages, tools))], llama.encoder)
    assert turns[0].reference == (
        '<tool_call>\n{"name": "tide", "arguments": {"port": "Skerry"}}\n</tool_call>'
    )  # fmt: skip
    assert turns[1].reference == "At noon."
    assert '"name": "tide"' in llama.encoder.tokenizer.decode(turns[0].prompt), "the prompt shows the tools"
    assert "at noon" in llama.encoder.tokenizer.decode(turns[1].prompt)


def test_reasoning_before_an_answer_is_no_part_of_it():
    assert without_thoughts("<think>\n\n</think>\n\nAye.") == "Aye."
    assert without_thoughts("let me see\n</think>\n\nAye.\nAye.") == "Aye.\nAye."
    assert without_thoughts("<think>\nnever ends") == "<think>\nnever ends"


# ---------------------------------------------------------------------------------------------------- whole scorings


def recipe_in(folder: Path, *overrides: str):
    folder.mkdir(exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text("model_name_or_path: m\ndataset_path: a.jsonl\noutput_dir: o\n", encoding="utf-8")
    plain = ["evaluation.metrics=[chrf]", f"evaluation.generation.max_new_tokens={NEW_TOKENS}"]
    return load_recipe(file, [f"output_dir={folder}", "evaluation.batch_size=3", *plain, *overrides])


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n") if line]


def score_alone(chatter, folder, *overrides, conversations=CONVERSATIONS, made_by="base weights"):
    recipe = recipe_in(folder, *overrides)
    return scoring.score(recipe, chatter.encoder, conversations, [("base", chatter.model, True, made_by)])


class Killed(BaseException):
    pass


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

    generate = scoring.generate
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(scoring, "generate", killed_in_batch_three)
        score_alone(llama, folder)
    working = folder / "predictions.partial.jsonl"
    lines = working.read_text(encoding="utf-8").split("\n")
    assert len(lines) == 1 + 6 + 1 and lines[-1] == "", "what made them, two batches of three, no half line"
    marked = json.loads(lines[2])
    marked["text"] = "kept\u2028\x85 as it was 🖎"
    lines[2] = json.dumps(marked, ensure_ascii=False)
    whole = "\n".join(lines[:-1]).encode()
    working.write_bytes(whole + b'\n{"model": "base", "key": "test.jsonl:9#1", "text": "\xf0\x9f')
    return folder, straight, marked


def count_generated(monkeypatch) -> list[int]:
    counts, generate = [], scoring.generate

    def counted(model, encoder, prompts, config):
        counts.append(len(prompts))
        return generate(model, encoder, prompts, config)

    monkeypatch.setattr(scoring, "generate", counted)
    return counts


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
def test_answers_of_other_making_are_not_taken_up(llama, cut_off, monkeypatch, other):
    folder, _, marked = cut_off
    generated = count_generated(monkeypatch)
    conversations = CONVERSATIONS[:-1] if other == "prompts" else CONVERSATIONS
    overrides = {"generation": ["evaluation.generation.repetition_penalty=1.3"], "dtype": ["model_init.dtype=float32"]}
    made_by = "others" if other == "weights" else "base weights"
    score_alone(llama, folder, *overrides.get(other, []), conversations=conversations, made_by=made_by)
    assert sum(generated) == (10 if other == "prompts" else 11)
    assert marked["text"] not in [prediction["base"] for prediction in predictions(folder)]


@pytest.mark.parametrize("change", ["evaluation.metrics=[bleu]", "evaluation.batch_size=2", "evaluation.language=zh"])
def test_answers_are_taken_up_where_only_their_scoring_changed(llama, cut_off, monkeypatch, change):
    generated = count_generated(monkeypatch)
    score_alone(llama, cut_off[0], change)
    assert sum(generated) == 11 - 6


def test_a_batch_that_does_not_fit_the_memory_is_halved(llama, tmp_path, monkeypatch):
    sizes, generate = [], scoring.generate

    def small(model, encoder, prompts, config):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return generate(model, encoder, prompts, config)

    score_alone(llama, tmp_path / "straight")
    monkeypatch.setattr(scoring, "generate", small)
    score_alone(llama, tmp_path / "small", "evaluation.batch_size=8")
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1]
    assert predictions(tmp_path / "small") == predictions(tmp_path / "straight")


def with_lora(model: PreTrainedModel, seed: int = 1):
    torch.manual_seed(seed)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(model), config)


def test_with_the_adapter_off_the_base_answers(llama, tmp_path):
    score_alone(llama, tmp_path / "plain", "evaluation.metrics=[perplexity]")
    tuned = with_lora(llama.model)
    models = [("base", tuned, False, "base"), ("tuned", tuned, True, "adapter")]
    recipe = recipe_in(tmp_path / "lora", "evaluation.metrics=[perplexity]")
    scores = scoring.score(recipe, llama.encoder, CONVERSATIONS, models)
    both, plain = predictions(tmp_path / "lora"), predictions(tmp_path / "plain")
    assert [row["base"] for row in both] == [row["base"] for row in plain]
    assert [row["tuned"] for row in both] != [row["base"] for row in both]
    alone = json.loads((tmp_path / "plain/scores.json").read_text(encoding="utf-8"))
    assert scores["base"]["perplexity"]["score"] == pytest.approx(alone["base"]["perplexity"]["score"], rel=1e-5)
    assert scores["tuned"]["perplexity"]["score"] != pytest.approx(scores["base"]["perplexity"]["score"], rel=1e-3)


@pytest.mark.parametrize("lora", [False, True])
def test_the_models_own_generation_defaults_stay_out_and_all_is_put_back(llama, tmp_path, lora):
    turns = list_turns(CONVERSATIONS, llama.encoder)
    model = with_lora(llama.model) if lora else copy.deepcopy(llama.model)
    chatter = Chatter(model, llama.encoder)
    expected = answers_of(chatter, turns, tmp_path / "plain.jsonl", 4, llama.stops)
    inner = model.get_base_model() if lora else model
    own = inner.generation_config
    own.update(do_sample=True, temperature=3.0, repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=9)
    inner.config.use_cache = False
    model.train()
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inner.enable_input_require_grads()
    assert answers_of(chatter, turns, tmp_path / "leaking.jsonl", 4, llama.stops) == expected
    assert inner.generation_config is own and own.repetition_penalty == 5.0
    assert model.training and inner.is_activation_checkpointing and not inner.config.use_cache
    model(input_ids=torch.tensor([turns[0].prompt] * 2)).logits.sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)


def test_the_state_of_the_model_is_put_back_after_a_failure_too(llama):
    model = copy.deepcopy(llama.model).train()
    own = model.generation_config
    with pytest.raises(Killed), for_generation(model, True):
        raise Killed
    assert model.training and model.generation_config is own


@pytest.mark.parametrize(("batch_size", "logit_rows"), [(1, 4096), (3, 4096), (16, 130)])
@pytest.mark.parametrize("name", ["smollm2", "chatglm3"])
def test_reference_losses_are_those_of_transformers_on_the_same_labels(
    name, batch_size, logit_rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(scoring, "LOGIT_ROWS", logit_rows)
    chatter = chatglm3_chatter(tmp_path) if name == "chatglm3" else random_chatter(name)
    turns = list_turns(CONVERSATIONS, chatter.encoder)
    with for_generation(chatter.model, True):
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
    with for_generation(llama.model, True):
        losses = reference_losses(llama.model, llama.encoder, turns, 1)
    mean = torch.tensor(losses["loss_sum"], dtype=torch.float64).sum() / sum(losses["tokens"])
    assert scores["perplexity"]["score"] == pytest.approx(mean.exp().item(), rel=1e-5)
    accuracy = 100 * sum(losses["correct"]) / sum(losses["tokens"])
    assert scores["token_accuracy"]["score"] == pytest.approx(accuracy)
    finished = [greedy(llama, turn.prompt, llama.stops)[1] for turn in turns]
    assert scores["stop_rate"]["score"] == pytest.approx(100 * sum(finished) / len(finished))


def test_predictions_and_scores_have_the_form_of_the_design(llama, tmp_path):
    tuned = with_lora(llama.model)
    models = [("base", tuned, False, "base"), ("tuned", tuned, True, "adapter")]
    scoring.score(recipe_in(tmp_path), llama.encoder, CONVERSATIONS, models)
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
    with pytest.raises(scoring.DataError, match="no assistant turn to score"):
        score_alone(llama, tmp_path, conversations=[("a.jsonl:1", Conversation([user("Hello")]))])


def test_sampling_with_stop_strings_is_what_the_recipe_may_ask_for(llama, tmp_path):
    sampling = ["evaluation.generation.do_sample=true", "evaluation.generation.stop_strings=[the]"]
    assert score_alone(llama, tmp_path, *sampling)["rows"] == 11


# ------------------------------------------------------------------------------------------------------------ --score


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved: two models and an adapter of each."""
    root = tmp_path_factory.mktemp("saved")
    chatter = random_chatter("smollm2")
    for name, seed in (("model", 0), ("other", 5)):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(chatter.model.config)
        model.save_pretrained(root / name)
        chatter.encoder.tokenizer.save_pretrained(root / name)
        with_lora(model, seed + 1).save_pretrained(root / f"{name}_adapter")
    row = {"conversation": [{"human": "Hello there", "assistant": "Fair and dry."}]}
    (root / "short.jsonl").write_text((json.dumps(row) + "\n") * 3, encoding="utf-8")
    return root


def score_command(folders, output, *overrides):
    return [
        str(ROOT / "recipes/smollm2_cpu.yaml"),
        f"model_name_or_path={folders}/model",
        f"output_dir={output}",
        f"dataset.train={ROOT}/data/demo/train.jsonl",
        f"dataset.validation={ROOT}/data/demo/validation.jsonl",
        f"dataset.test={ROOT}/data/demo/test.jsonl",
        "dataset.max_length=4096",
        "model_init.dtype=float32",
        "evaluation.metrics=[chrf]",
        "evaluation.generation.max_new_tokens=6",
        "evaluation.max_samples=4",
        "--score",
        *overrides,
    ]


def answers_in(folder: Path, name: str) -> list[str | None]:
    return [row[name] for row in predictions(folder)]


def test_score_takes_the_runs_own_adapter_or_another_by_override(folders, tmp_path):
    shutil.copytree(folders / "model_adapter", tmp_path / "lora_adapter")
    assert run_sft.main(score_command(folders, tmp_path)) == 0
    own = answers_in(tmp_path, "tuned")
    assert None not in own and own != answers_in(tmp_path, "base")
    another = score_command(folders, tmp_path, f"adapter_name_or_path={folders}/other_adapter")
    assert run_sft.main(another) == 0
    assert answers_in(tmp_path, "tuned") != own


def test_score_of_a_folder_without_a_run_scores_the_model_alone_and_any_file(folders, tmp_path, capfd):
    output = tmp_path / "nothing"
    assert run_sft.main(score_command(folders, output, f"dataset.test={folders}/short.jsonl")) == 0
    said = capfd.readouterr().out
    assert "holds no run: scoring" in said and "base chrf" in said
    assert [row["reference"] for row in predictions(output)] == ["Fair and dry."] * 3
    assert answers_in(output, "tuned") == [None] * 3
    scores = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    assert "tuned" not in scores and scores["rows"] == 3


def test_score_takes_another_model_by_override(folders, tmp_path):
    assert run_sft.main(score_command(folders, tmp_path / "one")) == 0
    assert run_sft.main(score_command(folders, tmp_path / "two", f"model_name_or_path={folders}/other")) == 0
    assert answers_in(tmp_path / "one", "base") != answers_in(tmp_path / "two", "base")


def test_score_of_a_full_fine_tuning_takes_its_final_model(folders, tmp_path):
    shutil.copytree(folders / "other", tmp_path / "run/final_model")
    assert run_sft.main(score_command(folders, tmp_path / "run", "lora_config=null")) == 0
    assert run_sft.main(score_command(folders, tmp_path / "two", f"model_name_or_path={folders}/other")) == 0
    assert run_sft.main(score_command(folders, tmp_path / "one")) == 0
    assert answers_in(tmp_path / "run", "tuned") == answers_in(tmp_path / "two", "base")
    assert answers_in(tmp_path / "run", "base") == answers_in(tmp_path / "one", "base")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_process_ends_as_if_nothing_had_happened_when_it_is_started_again(folders, tmp_path, monkeypatch):
    slow = ["evaluation.generation.max_new_tokens=60", "evaluation.batch_size=1", "evaluation.max_samples=16"]
    killed, straight = (score_command(folders, tmp_path / name, *slow) for name in ("killed", "straight"))
    process = run_process(killed, tmp_path / "cache")
    working, until = tmp_path / "killed/predictions.partial.jsonl", time.monotonic() + 60
    while not working.is_file() or working.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.005)
    process.kill()
    process.communicate()
    kept = working.read_bytes().count(b"\n") - 1
    generated = count_generated(monkeypatch)
    assert run_sft.main(killed) == 0
    assert 3 <= kept == 16 - sum(generated) < 16
    assert run_sft.main(straight) == 0
    for name in ("predictions.jsonl", "scores.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
