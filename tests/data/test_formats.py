"""The formats: which one a row is, what it says, what is wrong with it; dataset.columns."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sft.data.row_formats import detect_format, load_formats, to_conversation
from sft.errors import DataError, FormatError, RecipeError
from sft.recipe import load_recipe
from tests.data.conftest import RECIPE, talk, texts, write


def read(row, system=None):
    return to_conversation(row, detect_format(row), system)


def said(row, system=None):
    """The messages of a row, each as "role: content"."""
    return [f"{message['role']}: {message['content']}" for message in read(row, system).messages]


def shares(*turns):
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


# ---------------------------------------------------------------------------------------------------------- detection

ROWS = {
    "conversation": {"conversation": [{"human": "1", "assistant": "2"}]},
    "human_assistant": {"human": "1", "assistant": "2"},
    "instruction": {"instruction": "1", "output": "2"},
    "messages": {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]},
    "prompt_completion": {"prompt": "1", "completion": "2"},
    "query_response": {"query": "1", "response": "2"},
    "sharegpt": shares(("human", "1"), ("gpt", "2")),
}


def test_every_format_is_here():
    assert ROWS.keys() == load_formats().keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_each_format_is_told_from_the_others(name):
    assert detect_format(ROWS[name]).name == name
    assert said(ROWS[name]) == ["user: 1", "assistant: 2"]
    assert said(ROWS[name], "S") == ["system: S", "user: 1", "assistant: 2"]
    assert said({**ROWS[name], "system": "T"}, "S") == ["system: T", "user: 1", "assistant: 2"]


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ("conversation", "sharegpt", "conversation and sharegpt"),
        ("query_response", "prompt_completion", "prompt_completion and query_response"),
    ],
)
def test_a_row_of_two_formats_is_an_error_that_names_both(first, second, names):
    with pytest.raises(FormatError, match=f"^fits the formats {names}; say which with dataset.format$"):
        detect_format(ROWS[first] | ROWS[second])


def test_a_row_of_no_format_is_told_at_most_eight_of_its_fields():
    with pytest.raises(FormatError, match=r"no format fits the fields k0, k1, k2, k3, k4, k5, k6, k7, \.\.\.; docs"):
        detect_format({f"k{i}": 1 for i in range(9)})


words = st.text(min_size=1).filter(str.strip)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=4), st.none() | words)
def test_one_dialogue_says_the_same_in_every_format(turns, system):
    """The round trip: turns -> a row of each format -> the same messages."""
    expected = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        expected += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    *before, (question, answer) = turns
    before = [list(turn) for turn in before]
    dialogue = [message for message in expected if message["role"] != "system"]
    rows = [
        {"conversation": [{"human": q, "assistant": a} for q, a in turns]},
        {"messages": dialogue},
        {"prompt": dialogue[:-1], "completion": dialogue[-1:]},
        {"query": question, "response": answer, "history": before},
        {"instruction": question, "output": answer, "history": before},
        {"instruction": question, "output": answer, "history": json.dumps(before)},  # as a table holds it
        shares(*[turn for q, a in turns for turn in (("human", q), ("gpt", a))]),
    ]
    for row in rows:
        assert read({**row, "system": system}).messages == expected


# ----------------------------------------------------------------------------------------------------------- sharegpt


@pytest.mark.parametrize(
    ("role", "speakers"),
    [
        ("user", ["human", "user", "Human"]),
        ("assistant", ["gpt", "assistant", "chatgpt", "bing", "bard", "bot", "model", "GPT"]),
        ("tool", ["tool", "observation", "function_response", "tool_response", "function"]),
        ("system", ["system"]),
    ],
)
def test_every_speaker_of_sharegpt_has_its_role(role, speakers):
    for speaker in speakers:
        messages = read(shares((speaker, "1"), ("gpt", "2"))).messages
        assert messages[0] == {"role": role, "content": "1"}


@pytest.mark.parametrize("speaker", ["function_call", "tool_call"])
def test_a_function_call_of_sharegpt_becomes_tool_calls(speaker):
    call = '{"name": "add", "arguments": {"a": 2}}'
    tools = '[{"name": "add", "parameters": {}}]'
    row = shares(("human", "1"), (speaker, call), ("observation", "3"), ("gpt", "2"))
    messages, read_tools = read({**row, "tools": tools})[:2]
    assert messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
    }
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert read_tools == [{"name": "add", "parameters": {}}]


def test_one_turn_of_sharegpt_may_call_several_functions():
    (message,) = read(shares(("function_call", '[{"name": "f", "arguments": {}}, {"name": "g"}]'))).messages
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "f", "arguments": {}},
        {"name": "g", "arguments": {}},
    ]


def test_a_system_turn_of_sharegpt_is_the_system_prompt():
    assert said(shares(("system", "T"), ("human", "1"), ("gpt", "2")), "S") == ["system: T", "user: 1", "assistant: 2"]


@pytest.mark.parametrize("tools", ["", " ", "[]", None, []])
def test_no_tools_are_spelled_in_many_ways(tools):
    assert read({**ROWS["sharegpt"], "tools": tools}).tools is None


# ------------------------------------------------------------------------------------------------------- other formats


def test_prompt_and_completion_may_be_texts_or_messages():
    question, answer = {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}
    for prompt in ("1", [question]):
        for completion in ("2", [answer]):
            assert said({"prompt": prompt, "completion": completion}) == ["user: 1", "assistant: 2"]
    own = [{"role": "system", "content": "T"}, question]
    assert said({"prompt": own, "completion": "2"}, "S") == ["system: T", "user: 1", "assistant: 2"]


def test_a_completion_may_call_tools():
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    row = {"prompt": "1", "completion": [{"role": "assistant", "tool_calls": calls}], "tools": [{"name": "f"}]}
    assert read(row).messages[1]["tool_calls"] == calls and read(row).tools == [{"name": "f"}]


# ------------------------------------------------------------------------------------------------------------- errors

WRONG = [
    (shares(("alien", "1")), "the speaker (from) of turn 1 is 'alien'; known are human, gpt, "),
    (shares(("human", "1")), "there is no answer in conversations"),
    ({"conversations": []}, "there is no answer in conversations"),
    ({"conversations": ["1"]}, 'turn 1 is str, not {"from", "value"}'),
    ({"conversations": [{"from": ["gpt"], "value": "1"}]}, "the speaker (from) of turn 1 is ['gpt']"),
    ({"conversations": [{"from": "gpt"}]}, "the value of turn 1 (gpt) is missing"),
    ({"conversations": [{"from": "gpt", "value": 3}]}, "the value of turn 1 (gpt) is int, not text"),
    (shares(("human", " "), ("gpt", "2")), "the value of turn 1 (human) is empty"),
    (shares(("human", "1"), ("gpt", "")), "the value of turn 2 (gpt) is empty"),
    (shares(("function_call", "{")), "the function_call of turn 1 is not JSON"),
    (shares(("function_call", "[]")), 'the function_call of turn 1 is not {"name", "arguments"}'),
    (shares(("function_call", '{"arguments": {}}')), 'the function_call of turn 1 is not {"name", "arguments"}'),
    ({"prompt": "1", "completion": " "}, "completion is empty"),
    ({"prompt": " ", "completion": "2"}, "prompt is empty"),
    ({"prompt": "1", "completion": []}, "there is no assistant message in completion"),
    ({"prompt": "1", "completion": ["2"]}, 'message 1 of completion is not {"role", "content"}'),
    ({"prompt": [{"role": "alien", "content": "1"}], "completion": "2"}, "message 1 of prompt is not"),
    ({"prompt": [{"role": "user"}], "completion": "2"}, "the content of message 1 of prompt is NoneType, not text"),
    ({"prompt": 3, "completion": "2"}, "the field 'prompt' is a number, not text or a list"),
    ({"query": " ", "response": "2"}, "the query is empty"),
    ({"query": "1", "response": " "}, "the answer (response) is empty"),
    ({"query": "1", "response": "2", "history": [["1"]]}, "turn 1 of the history is not [query, response]"),
    ({"query": "1", "response": "2", "history": [["1", None]]}, "turn 1 of the history is not [query, response]"),
    ({"query": "1", "response": "2", "history": [["1", ""]]}, "turn 1 of the history has an empty query or response"),
    ({"query": "1", "response": "2", "history": "[["}, "the field 'history' is text, not a list"),
    ({"query": "1", "response": "2", "history": '{"a": 1}'}, "the field 'history' is text, not a list"),
    ({"instruction": "1", "output": "2", "history": ["1"]}, "turn 1 of the history is not [instruction, output]"),
    ({"instruction": "1", "output": "2", "history": [["", "2"]]}, "turn 1 of the history has an empty instruction"),
    ({"human": "1", "assistant": ""}, "the answer (assistant) is empty"),
    ({"human": "", "assistant": "2"}, "the question (human) is empty"),
]


@pytest.mark.parametrize(("row", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_with_a_row_is_said(row, message):
    with pytest.raises(FormatError) as caught:
        read(row)
    assert str(caught.value).startswith(message)


# ------------------------------------------------------------------------------------------------------------ columns

RENAME = "dataset.columns={question: human, answer: assistant}"


@pytest.mark.parametrize(
    "row",
    [{"question": "1", "answer": "2"}, {"conversation": [{"question": "1", "answer": "2"}]}],
    ids=["of the row", "of its turns"],
)
def test_columns_rename_the_keys_of_rows_and_of_turns(run, tokenizer, row):
    write("train.jsonl", row)
    write("test.jsonl", row)
    data = run(RENAME, "dataset.test=test.jsonl")
    assert texts(tokenizer, data.train) == ["S<|im_end|> 1<|im_end|> 2<|im_end|>"]
    assert [message["content"] for message in data.test_conversations[0][1].messages] == ["S", "1", "2"]
    stream = run(RENAME, "dataset.streaming=true", "training_args.max_steps=1").train
    assert next(iter(stream))["input_ids"] == data.train[0]["input_ids"]


def test_columns_may_trade_names_and_leave_tools_alone(run):
    tools = [{"name": "f", "query": 1}]
    row = {"query": "2", "response": "1", "tools": tools}
    write("train.jsonl", row)
    write("test.jsonl", row)
    data = run("dataset.columns={query: response, response: query}", "dataset.test=test.jsonl")
    conversation = data.test_conversations[0][1]
    assert [message["content"] for message in conversation.messages] == ["S", "1", "2"] and conversation.tools == tools


def test_each_file_may_have_other_names_of_its_keys(run, tokenizer):
    write("train.jsonl", {"question": "1", "answer": "2"})
    write("b.jsonl", {"q": "3", "a": "4"})
    write("c.jsonl", {"human": "5", "assistant": "6"})
    own = "{path: b.jsonl, columns: {q: human, a: assistant}}"
    sources = f"dataset.train=[train.jsonl, {own}, {{path: c.jsonl, columns: {{}}}}]"
    data = run(RENAME, sources, f"dataset.test={own}")
    assert [text.replace("<|im_end|>", "") for text in texts(tokenizer, data.train)] == ["S 1 2", "S 3 4", "S 5 6"]
    ((place, conversation),) = data.test_conversations
    assert place == "b.jsonl:1" and [message["content"] for message in conversation.messages] == ["S", "3", "4"]
    stream = run(RENAME, sources, "dataset.streaming=true", "training_args.max_steps=1").train
    assert [row["input_ids"] for row in stream] == data.train["input_ids"]
    with pytest.raises(RecipeError, match=r"dataset.train\[0\].columns: gives two columns the name 'human'"):
        run("dataset.train=[{path: train.jsonl, columns: {question: human, answer: human}}]")


def test_a_source_without_columns_is_described_as_before_there_were_any(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    described = load_recipe(tmp_path / "recipe.yaml").to_dict()["dataset"]["train"]
    assert described == [{"path": "train.jsonl", "format": "auto", "weight": 1.0, "subset": None, "split": None}]


def test_other_columns_make_the_rows_anew(run):
    write("train.jsonl", {"query": "1", "response": "2", "a": "3"})
    first = run().train[0]["input_ids"]
    assert run("dataset.columns={query: b, a: query}").train[0]["input_ids"] != first


def test_a_column_that_no_row_has_is_an_error_with_the_file(run):
    write("train.jsonl", "{", talk("1", "2"))
    with pytest.raises(DataError) as caught:
        run("dataset.columns={question: human}")
    assert str(caught.value) == ("train.jsonl: no row has question, which `columns` renames; it has conversation")


def test_a_row_with_the_old_and_the_new_name_is_a_bad_row(run):
    write("train.jsonl", {"question": "1", "human": "3", "answer": "2"})
    with pytest.raises(DataError, match="^train.jsonl:1: has 'question' and 'human', which `columns` makes one"):
        run(RENAME)


def test_two_columns_cannot_have_one_name(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    with pytest.raises(RecipeError, match="dataset.columns.*: gives two columns the name 'human'; keep one of them"):
        load_recipe(tmp_path / "recipe.yaml", ["dataset.columns={question: human, prompt: human}"])
    with pytest.raises(RecipeError, match="dataset.columns.question: found 3; give text"):
        load_recipe(tmp_path / "recipe.yaml", ["dataset.columns={question: 3}"])
