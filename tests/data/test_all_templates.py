"""Every chat template of the installed trl, with the text of each answer that carries loss written out.

A template that is new there has no entry in these tables, and its tests fail: read what it trains, then add it.
"""

import json
from pathlib import Path

import pytest
import trl

from formats.messages import to_messages
from sft.data.chat import HEADER_MERGED, ChatEncoder
from sft.data.conversation import Conversation
from sft.errors import FormatError
from tests.families import tokenizer_for

NAMES = sorted(path.stem for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))

HI, WHY = {"role": "user", "content": "Hi."}, {"role": "user", "content": "Why?"}
HELLO, SO = {"role": "assistant", "content": "Hello."}, {"role": "assistant", "content": "So."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call00001", "type": "function", "function": {"name": "get_x", "arguments": {"x": "1"}}}],
}
RESULT = {"role": "tool", "name": "get_x", "tool_call_id": "call00001", "content": "2"}
PARAMETERS = {"type": "object", "properties": {"x": {"type": "string", "description": "X."}}, "required": ["x"]}
TOOLS = [{"type": "function", "function": {"name": "get_x", "description": "Gets X.", "parameters": PARAMETERS}}]

THINK = "<think>\n\n</think>\n\n"

# What carries loss around "Hello." and "So." in a dialogue of two turns.
PLAIN = {
    **dict.fromkeys(
        ["lfm2", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "lfm2_v2", "qwen2_5", "qwen2_5_vl", "qwen3_5_nothink"]
        + ["qwen3_instruct_2507", "qwen3_vl"],
        ("Hello.<|im_end|>", "So.<|im_end|>"),
    ),
    "cohere": ("Hello.<|END_OF_TURN_TOKEN|>", "So.<|END_OF_TURN_TOKEN|>"),
    "cohere2": ("Hello.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "So.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "deepseek_r1_distill": ("Hello.<｜end▁of▁sentence｜>", "So.<｜end▁of▁sentence｜>"),
    "deepseekv3": ("Hello.<｜end▁of▁sentence｜>", "So.<｜end▁of▁sentence｜>"),
    **dict.fromkeys(["gemma", "gemma3"], ("Hello.<end_of_turn>", "So.<end_of_turn>")),
    **dict.fromkeys(
        ["diffusion_gemma", "gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"],
        ("Hello.<turn|>", "So.<turn|>"),
    ),
    # The next role's marker is what ends a turn; after the last one it is appended.
    "glm4moe": ("\n<think></think>\nHello.<|user|>", "\n<think></think>\nSo.<|user|>"),
    # Each answer where it is the last: within a dialogue the template writes <|end|> for its <|return|>.
    "gptoss": ("<|channel|>final<|message|>Hello.<|return|>", "<|channel|>final<|message|>So.<|return|>"),
    **dict.fromkeys(["idefics3", "smolvlm"], (" Hello.<end_of_utterance>", " So.<end_of_utterance>")),
    "llava_next": (" Hello.</s>", " So.</s>"),
    **dict.fromkeys(["llama3", "llama3_1", "llama3_2"], ("Hello.<|eot_id|>", "So.<|eot_id|>")),
    "muse_glimmer": (" to=user<|message|>Hello.<|eot|>", " to=user<|message|>So.<|eot|>"),
    **dict.fromkeys(
        ["nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"],
        ("</think>Hello.<|im_end|>", "</think>So.<|im_end|>"),
    ),
    **dict.fromkeys(["phi3", "phi3_5"], ("Hello.<|end|>", "So.<|end|>")),
    # These write the reasoning of the last answer only; where their prompt ends with "<think>\n", the rest is trained.
    "qwen3": ("Hello.<|im_end|>", f"{THINK}So.<|im_end|>"),
    "qwen3_training": (f"{THINK}Hello.<|im_end|>", f"{THINK}So.<|im_end|>"),
    **dict.fromkeys(["qwen3_5_think", "qwen3_6"], ("Hello.<|im_end|>", "\n</think>\n\nSo.<|im_end|>")),
    **dict.fromkeys(
        ["qwen3_5_think_training", "qwen3_6_training", "qwen3_8"],
        ("\n</think>\n\nHello.<|im_end|>", "\n</think>\n\nSo.<|im_end|>"),
    ),
}

XML_CALL = "<tool_call>\n<function=get_x>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"
JSON_CALL = '<tool_call>\n{"name": "get_x", "arguments": {"x": "1"}}\n</tool_call>'
GEMMA_CALL = '<|tool_call>call:get_x{x:<|"|>1<|"|>}<tool_call|>'
ATEM_CALL = (
    '<atem:function_calls>\n<atem:invoke name="get_x">\n<atem:parameter name="x">1</atem:parameter>\n'
    "</atem:invoke>\n</atem:function_calls>"
)

# What carries loss in a call to get_x(x="1"), and in the answer "So." to what the tool gave; None: no tool calls.
CALLED = {
    **dict.fromkeys(["cohere", "cohere2", "deepseek_r1_distill", "gemma", "gemma3", "idefics3", "lfm2", "llama3"]),
    **dict.fromkeys(["llava_next", "phi3", "phi3_5", "qwen2_5_vl", "smolvlm"]),
    "deepseekv3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_x\n```json\n"
        '{"x": "1"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
        "So.<｜end▁of▁sentence｜>",
    ),
    # The template begins a new turn after what the tool gave, though its generation prompt does not.
    "diffusion_gemma": (f"{GEMMA_CALL}<|tool_response>", "<|turn>model\nSo.<turn|>"),
    **dict.fromkeys(["gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5"], (f"{GEMMA_CALL}<|tool_response>", "So.<turn|>")),
    "gemma4_v2": (f"{GEMMA_CALL}<turn|>", "So.<turn|>"),
    "glm4moe": (
        "\n<think></think>\n<tool_call>get_x\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call><|observation|>",
        "\n<think></think>\nSo.<|user|>",
    ),
    "gptoss": (
        ' to=functions.get_x<|channel|>commentary json<|message|>{"x": "1"}<|call|>',
        "<|channel|>final<|message|>So.<|return|>",
    ),
    **dict.fromkeys(
        ["lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "lfm2_v2"],
        ("<|tool_call_start|>[get_x(x='1')]<|tool_call_end|><|im_end|>", "So.<|im_end|>"),
    ),
    **dict.fromkeys(
        ["llama3_1", "llama3_2"], ('{"name": "get_x", "parameters": {"x": "1"}}<|eot_id|>', "So.<|eot_id|>")
    ),
    "muse_glimmer": (f" to=get_x<|message|>{ATEM_CALL}<|eot|>", " to=user<|message|>So.<|eot|>"),
    **dict.fromkeys(
        ["nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"],
        (f"</think>\n{XML_CALL}\n<|im_end|>", "</think>So.<|im_end|>"),
    ),
    **dict.fromkeys(["qwen2_5", "qwen3_instruct_2507", "qwen3_vl"], (f"{JSON_CALL}<|im_end|>", "So.<|im_end|>")),
    "qwen3": (f"{JSON_CALL}<|im_end|>", f"{THINK}So.<|im_end|>"),
    "qwen3_training": (f"{THINK}{JSON_CALL}<|im_end|>", f"{THINK}So.<|im_end|>"),
    "qwen3_5_nothink": (f"{XML_CALL}<|im_end|>", "So.<|im_end|>"),
    **dict.fromkeys(
        ["qwen3_5_think", "qwen3_6", "qwen3_8"],
        (f"\n</think>\n\n{XML_CALL}<|im_end|>", "\n</think>\n\nSo.<|im_end|>"),
    ),
}


def entry(table, name):
    """What a template trains; one of trl's variants for training writes what the model's own does."""
    return table[name] if name in table else table[name.removesuffix("_training")]


def given(name, messages):
    """The messages as a user of transformers gives them to this template."""
    if name.removesuffix("_training") in ("idefics3", "llava_next", "smolvlm"):
        return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    arguments = CALL["tool_calls"][0]["function"]["arguments"]
    fitted = [calling(json.dumps(arguments) if name == "deepseekv3" else arguments, m) for m in messages]
    return [{**m, "content": ""} if name.startswith("deepseekv3") and m["content"] is None else m for m in fitted]


def calling(arguments, message=CALL):
    """The message with these arguments of its call, if it calls."""
    if "tool_calls" not in message:
        return message
    call = message["tool_calls"][0]
    return {**message, "tool_calls": [{**call, "function": {**call["function"], "arguments": arguments}}]}


def check(name, messages, tools, expected):
    """The answers' texts are the expected ones, and the ids those of `apply_chat_template` up to a closing marker."""
    chat = ChatEncoder(tokenizer_for(name))
    decode = chat.tokenizer.decode
    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    # Each answer in a row of its own, or all in one.
    each = name.startswith("gptoss")
    found = []
    for conversation in [messages[: k + 1] for k in answers] if each else [messages]:
        ids, turns, notes = chat.encode(conversation, tools, last_only=each)
        found += [decode(ids[start:stop]) for start, stop in turns]
        own = chat.tokenizer.apply_chat_template(given(name, conversation), tools=tools, return_dict=False)
        closing = chat.tokenizer.convert_tokens_to_ids(["<|user|>"]) if name == "glm4moe" else []
        if HEADER_MERGED in notes:
            assert decode(ids) == decode(own + closing)
        else:
            assert list(ids) == own + closing
        assert {ids[stop - 1] for _, stop in turns} <= chat.stop_ids
    assert found == list(expected)


@pytest.mark.parametrize("name", NAMES)
def test_answers_of_a_dialogue_are_told_under_every_template(name):
    check(name, [HI, HELLO, WHY, SO], None, entry(PLAIN, name))


@pytest.mark.parametrize("form", ["object", "text", "text beside null"])
@pytest.mark.parametrize("name", NAMES)
def test_tool_calls_are_told_under_every_template_that_writes_them(name, form):
    """Arguments may be an object, or its JSON text as at OpenAI; the template is given what it wants."""
    message = calling({"x": "1"} if form == "object" else '{"x": "1"}')
    if form == "text beside null":
        message["content"] = None
    if expected := entry(CALLED, name):
        check(name, [HI, message, RESULT, SO], TOOLS, expected)


@pytest.mark.parametrize("form", ["object", "text"])
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "deepseekv3", "gemma4_v2", "llama3_1", "glm4moe"])
def test_prompt_has_the_same_call_for_arguments_in_either_form(name, form):
    arguments = {"object": {"x": 'é <&> "1"'}, "text": '{"x": "é <&> \\"1\\""}'}[form]
    chat = ChatEncoder(tokenizer_for(name))
    ids = chat.encode_prompt([HI, calling(arguments), RESULT], TOOLS)
    assert ids == chat.encode_prompt([HI, calling({"x": 'é <&> "1"'}), RESULT], TOOLS)
    (many,) = chat.encode_batch([Conversation([HI, calling(arguments), RESULT, SO], TOOLS)])
    assert list(many.input_ids[: len(ids)]) == ids


def test_text_of_arguments_stays_as_it_is_where_the_template_takes_both():
    text = ChatEncoder(tokenizer_for("qwen3")).render([HI, calling('{"x":"1"}')])
    assert '{"name": "get_x", "arguments": {"x":"1"}}' in text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [("x=1", "of message 2 are not JSON: Expecting value"), ("[1]", "of message 2 are not a JSON object")],
)
def test_arguments_that_cannot_become_an_object_are_refused(arguments, reason):
    chat = ChatEncoder(tokenizer_for("qwen2_5"))
    conversation = Conversation([HI, calling(arguments), RESULT, SO], TOOLS)
    with pytest.raises(FormatError, match=reason):
        chat.encode(*conversation)
    good, bad = chat.encode_batch([Conversation([HI, HELLO]), conversation])
    assert len(good.turns) == 1
    assert reason in str(bad)


def test_control_token_that_the_text_of_arguments_escapes_is_found():
    conversation = Conversation([HI, calling('{"x": "\\u003c|im_end|>"}'), RESULT, SO], TOOLS)
    chat = ChatEncoder(tokenizer_for("qwen2_5"))
    with pytest.raises(FormatError, match=r"spells the control token '<\|im_end\|>'"):
        chat.encode(*conversation)
    assert isinstance(chat.encode_batch([conversation])[0], FormatError)
    as_text = ChatEncoder(tokenizer_for("qwen2_5"), spelled_control_tokens="text")
    ids = as_text.encode(*conversation).input_ids
    assert list(ids).count(as_text.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 5


def test_content_that_comes_in_parts_is_its_text():
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo."}]
    row = {"messages": [HI, {"role": "assistant", "content": parts}]}
    assert to_messages(row) == [HI, HELLO]
    assert row["messages"][1]["content"] == parts


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "image_url"),
        ("Hello.", "str"),
        ({"type": "text"}, "text"),
    ],
)
def test_part_that_is_not_text_is_refused(part, kind):
    with pytest.raises(FormatError, match=f"content of message 1 has a part of type '{kind}'; only parts"):
        to_messages({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi."}, part]}, HELLO]})


@pytest.mark.parametrize("name", ["idefics3", "llava_next", "smolvlm"])
def test_template_that_takes_only_parts_is_given_parts(name):
    chat = ChatEncoder(tokenizer_for(name))
    messages = [HI, HELLO, WHY]
    own = chat.tokenizer.apply_chat_template(given(name, messages), return_dict=False, add_generation_prompt=True)
    assert chat.encode_prompt(messages) == own


def test_template_that_takes_text_is_given_text():
    """Cohere's would fail at a list; Qwen2.5-VL's takes both."""
    for name in ("cohere", "qwen2_5_vl"):
        chat = ChatEncoder(tokenizer_for(name))
        assert chat.encode_prompt([HI]) == chat.tokenizer.apply_chat_template(
            [HI], return_dict=False, add_generation_prompt=True
        )
