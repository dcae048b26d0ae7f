"""`train: false` in a message: the text stays, its loss goes, the ledger counts it, scoring passes over it."""

import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sft.data.chat import ChatEncoder
from sft.data.row_formats import detect_format, to_conversation
from sft.data.tokens import UNTRAINED, FileTokeniser
from sft.errors import DataError
from sft.recipe import Source, load_recipe
from sft.results.answers import list_turns
from tests.data.conftest import RECIPE, talk, write
from tests.families import FAMILIES, build


def chat(*answers):
    """A row of messages: to the question "q" each answer, ("text", {more keys of its message})."""
    messages = []
    for text, keys in answers:
        messages += [{"role": "user", "content": "q"}, {"role": "assistant", "content": text, **keys}]
    return {"messages": messages}


def supervised(tokenizer, row):
    """What carries loss, turn by turn."""
    pieces, before = [], 0
    for token, mask in zip(row["input_ids"], row["assistant_mask"], strict=True):
        if mask and not before:
            pieces.append([])
        if mask:
            pieces[-1].append(token)
        before = mask
    return [tokenizer.decode(piece) for piece in pieces]


# ----------------------------------------------------------------------------------------------------------- the mask


@pytest.mark.parametrize(
    "keys",
    [{"train": False}, {"loss": False}, {"weight": 0}, {"weight": 0.0}, {"train": 0}, {"train": False, "weight": 0}],
    ids=json.dumps,
)
def test_an_answer_taken_out_stays_in_the_text_and_carries_no_loss(run, tokenizer, keys):
    write("train.jsonl", chat(("1", {}), ("2", keys), ("3", {})))
    write("plain.jsonl", chat(("1", {}), ("2", {}), ("3", {})))
    data = run("dataset.train=[train.jsonl, plain.jsonl]")
    assert data.train[0]["input_ids"] == data.train[1]["input_ids"]
    assert supervised(tokenizer, data.train[0]) == ["1<|im_end|>", "3<|im_end|>"]
    assert [file["notes"] for file in data.ledger["files"]] == [{UNTRAINED: 1}, {}]
    assert [file["supervised_tokens"] for file in data.ledger["files"]] == [4, 6]


@pytest.mark.parametrize("keys", [{"train": True}, {"weight": 1}, {"loss": None}, {"train": None, "weight": 1.0}])
def test_an_answer_that_is_marked_to_be_trained_is_one_like_any_other(run, tokenizer, keys):
    write("train.jsonl", chat(("1", {}), ("2", keys)))
    write("plain.jsonl", chat(("1", {}), ("2", {})))
    data = run("dataset.train=[train.jsonl, plain.jsonl]")
    assert data.train[0] == data.train[1] and data.ledger["files"][0]["notes"] == {}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gptoss"])  # which gives an example an answer
def test_the_text_of_every_family_is_the_same_with_and_without_the_key(empty_folder, name):
    """The key reaches no template, and the loss of the other answers is what it was."""
    tokenizer = build(FAMILIES[name], "bytes")
    marks = [True, False, True, False]
    plain, marked = ([(str(i), {"train": m} if use else {}) for i, m in enumerate(marks)] for use in (False, True))
    encoder = ChatEncoder(tokenizer)
    Path("recipe.yaml").write_text(RECIPE.replace("  system: S\n", "") + "chat: {examples: whole}\n", encoding="utf-8")
    rows = [(1, chat(*plain)), (2, chat(*marked)), (3, chat(*marked))]
    tokeniser = FileTokeniser(encoder, load_recipe("recipe.yaml"), Source("x"))
    every, some, again = (row for batch in tokeniser.batches(rows) for row in batch.to_pylist())
    assert every["input_ids"] == some["input_ids"] and some["assistant_mask"] == again["assistant_mask"]
    said = supervised(tokenizer, every)
    assert supervised(tokenizer, some) == [said[0], said[2]]


@pytest.mark.parametrize("name", ["qwen3", "gptoss"])  # gpt-oss' earlier answers cannot be told beside the last
@pytest.mark.parametrize("out", [0, 1])
def test_an_answer_that_is_taken_out_gives_no_example_of_its_own(empty_folder, name, out):
    tokenizer = build(FAMILIES[name], "bytes")
    Path("recipe.yaml").write_text(RECIPE.replace("  system: S\n", ""), encoding="utf-8")
    marked = chat(*((str(i), {"train": False} if i == out else {}) for i in range(3)))
    rows = [(1, marked), (2, chat(*((str(i), {}) for i in range(3))))]
    tokeniser = FileTokeniser(ChatEncoder(tokenizer), load_recipe("recipe.yaml"), Source("x"))
    made = [row for batch in tokeniser.batches(rows) for row in batch.to_pylist()]
    of_first, of_second = ([row for row in made if row["line"] == line] for line in (1, 2))
    for column in ("input_ids", "assistant_mask"):
        assert [row[column] for row in of_first] == [row[column] for i, row in enumerate(of_second) if i != out]
    assert tokeniser.facts()["notes"]["answers that their rows take out of the loss"] == 1
    assert len(of_second) == 3 and not tokeniser.problems


@given(st.lists(st.sampled_from([None, True, False]), min_size=1, max_size=6))
def test_what_carries_loss_is_what_is_not_taken_out(marks):
    row = chat(*[(str(i), {} if mark is None else {"train": mark}) for i, mark in enumerate(marks)])
    messages, _, untrained = to_conversation(row, detect_format(row), "S")
    assert untrained == {2 * i + 2 for i, mark in enumerate(marks) if mark is False}
    assert not any("train" in message for message in messages)


def test_packing_and_streaming_keep_what_is_taken_out(run, tokenizer):
    write("train.jsonl", chat(("1", {"train": False}), ("2", {})), chat(("3", {}), ("4", {"train": False})))
    plain, packed = run().train, run("dataset.packing=true").train
    assert [supervised(tokenizer, row) for row in plain] == [["2<|im_end|>"], ["3<|im_end|>"]]
    assert len(packed) == 1 and sorted(supervised(tokenizer, packed[0])) == ["2<|im_end|>", "3<|im_end|>"]
    stream = run("dataset.streaming=true", "training_args.max_steps=1").train
    assert [row["assistant_mask"] for row in stream] == plain["assistant_mask"]


def test_the_last_turn_only_is_none_if_it_is_taken_out(run, tokenizer):
    write("train.jsonl", chat(("1", {"train": False}), ("2", {})), chat(("3", {}), ("4", {"train": False})))
    skip = ["chat.loss_on=last_turn", "dataset.on_error=skip", "dataset.max_lost=1"]
    data = run(*skip)
    assert [supervised(tokenizer, row) for row in data.train] == [["2<|im_end|>"]]
    assert data.ledger["files"][0]["dropped"] == {"bad row": [2]}


def test_a_conversation_without_any_answer_to_train_on_is_a_bad_row(run):
    write("train.jsonl", chat(("1", {})), chat(("1", {"train": False}), ("2", {"weight": 0})))
    with pytest.raises(DataError, match="^train.jsonl:2: there is no assistant turn to train on"):
        run()


def test_a_row_that_is_cut_before_its_first_trained_answer_is_over_long(run):
    write("train.jsonl", chat(("1", {"train": False}), ("2" * 60, {})), chat(("1", {}), ("2" * 60, {"train": False})))
    data = run("dataset.max_length=40", "dataset.max_lost=1")
    file = data.ledger["files"][0]
    assert file["dropped"] == {"over-long": [1]} and file["trimmed"] == [2]
    assert file["notes"] == {}  # the answer that was taken out was cut off


# -------------------------------------------------------------------------------------------------- formats and errors


def test_answers_of_a_prompt_carry_no_loss_and_those_of_a_completion_do(run, tokenizer):
    question = {"role": "user", "content": "q"}
    prompt = [question, {"role": "assistant", "content": "1"}, question]
    write("train.jsonl", {"prompt": prompt, "completion": [{"role": "assistant", "content": "2"}]})
    data = run()
    assert supervised(tokenizer, data.train[0]) == ["2<|im_end|>"]
    assert data.ledger["files"][0]["notes"] == {UNTRAINED: 1}


def test_turns_of_sharegpt_may_be_taken_out(run, tokenizer):
    turns = [("human", "q", {}), ("gpt", "1", {"train": False}), ("human", "q", {}), ("gpt", "2", {})]
    write("train.jsonl", {"conversations": [{"from": who, "value": text, **keys} for who, text, keys in turns]})
    assert supervised(tokenizer, run().train[0]) == ["2<|im_end|>"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "assistant", "content": "1", "weight": 0.5}, "a message has weight: 0.5; give true or false"),
        ({"role": "assistant", "content": "1", "train": "false"}, 'a message has train: "false"; give true or false'),
        ({"role": "assistant", "content": "1", "train": True, "weight": 0}, "train and weight, which disagree"),
        ({"role": "user", "content": "1", "train": True}, "a message of role user has train: true; only answers"),
    ],
)
def test_a_mark_that_cannot_be_followed_is_a_bad_row(run, message, reason):
    write("train.jsonl", {"messages": [*chat(("1", {}))["messages"], message]})
    with pytest.raises(DataError, match=reason) as caught:
        run()
    assert str(caught.value).startswith("train.jsonl:1: ")


def test_a_question_that_is_marked_as_not_trained_is_fine(run, tokenizer):
    row = chat(("1", {"weight": 1}))
    row["messages"][0]["weight"] = 0
    write("train.jsonl", row)
    assert supervised(tokenizer, run().train[0]) == ["1<|im_end|>"]


# ------------------------------------------------------------------------------------------------------------- scoring


def test_scoring_passes_over_answers_that_are_taken_out(run):
    write("train.jsonl", talk("1", "2"))
    write("test.jsonl", chat(("1", {"train": False}), ("2", {}), ("3", {"train": False})), chat(("4", {})))
    data = run("dataset.test=test.jsonl")
    turns = list_turns(data.test_conversations, data.encoder)
    assert [(turn.key, turn.reference) for turn in turns] == [("test.jsonl:1#4", "2"), ("test.jsonl:2#2", "4")]
    assert data.encoder.tokenizer.decode(turns[0].prompt).count("1<|im_end|>") == 1  # the history keeps it
