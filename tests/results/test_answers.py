"""Answers of tiny random models, held against plain loops over plain forward passes."""

import copy

import pytest
import torch

from sft.data.chat import ChatEncoder
from sft.data.conversation import Conversation
from sft.results.answers import answer_text, generation_mode, list_turns, without_thoughts
from tests.families import tokenizer_for
from tests.results.chatters import (
    CONVERSATIONS,
    RANDOM_MODELS,
    Chatter,
    Killed,
    answers_of,
    assistant,
    chatglm3_chatter,
    greedy,
    make_it_stop,
    random_chatter,
    user,
    with_lora,
)


@pytest.mark.parametrize("name", [*RANDOM_MODELS, "chatglm3"])
def test_a_batch_writes_what_each_prompt_gets_alone_cut_at_the_stop_token(name, tmp_path):
    chatter = chatglm3_chatter(tmp_path) if name == "chatglm3" else random_chatter(name)
    turns = list_turns(CONVERSATIONS, chatter.encoder)
    stops = make_it_stop(chatter, turns)
    alone = [greedy(chatter, turn.prompt, stops) for turn in turns]
    expected = [(answer_text(chatter.encoder, ids), finished) for ids, finished in alone]
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
    assert answer_text(chatter.encoder, ids) == "the pier"


def test_of_an_answer_in_channels_the_final_one_is_compared():
    encoder = ChatEncoder(tokenizer_for("gptoss"))
    written = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
    ids = encoder.tokenizer.encode(f"{written}The pier.", add_special_tokens=False)
    assert answer_text(encoder, ids) == "The pier."
    assert answer_text(encoder, ids[: -len(ids) // 2]).startswith("analysis")  # cut off before it got there
    qwen = ChatEncoder(tokenizer_for("qwen3"))
    assert answer_text(qwen, qwen.tokenizer.encode("<think>\n\n</think>\n\nAye.")) == "<think>\n\n</think>\n\nAye."


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
    with pytest.raises(Killed), generation_mode(model, True):
        raise Killed
    assert model.training and model.generation_config is own
