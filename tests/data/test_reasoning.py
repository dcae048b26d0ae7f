"""chat.loss_on: after_thinking: loss begins behind an answer's reasoning; an answer without any keeps all of it."""

import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from sft.data.chat import ChatEncoder
from sft.data.conversation import Conversation, assistant_turns
from sft.errors import FormatError
from sft.model.tokenizer import with_defaults
from tests.data.test_examples import OTHERS, tokenizer_of
from tests.families import FAMILIES, build, conversations, trained

Q = {"role": "user", "content": "Hi."}
R1 = Path(__file__).resolve().parents[2] / "recipes/deepseek_r1_distill.jinja"
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def supervised(tokenizer, messages):
    """The text of each answer's tokens that carry loss, by `encode`; `encode_batch` must give the same."""
    encoder = ChatEncoder(tokenizer, after_thinking=True)
    one = encoder.encode(messages)
    for many in encoder.encode_batch([Conversation(messages)] * 3):
        assert (list(many.input_ids), list(map(tuple, many.turns))) == (
            list(one.input_ids),
            list(map(tuple, one.turns)),
        )
    assert list(one.input_ids) == list(ChatEncoder(tokenizer).encode(messages).input_ids)
    return [tokenizer.decode(one.input_ids[a:b]) for a, b in one.turns]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (answer("Aye."), "Aye.<|im_end|>"),  # behind the empty block that the template writes
        (answer("Aye.", reasoning_content="Hm."), "Aye.<|im_end|>"),
        (answer("Aye.", reasoning="Hm."), "Aye.<|im_end|>"),
        (answer("Aye.", thinking="Hm."), "Aye.<|im_end|>"),
        (answer("<think>\nHm.\n</think>\n\nAye."), "Aye.<|im_end|>"),
        (answer("Aye.", reasoning_content="a </think> b"), "Aye.<|im_end|>"),
        (
            answer("", reasoning_content="Hm.", tool_calls=[CALL]),
            '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>',
        ),
    ],
)
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_qwen3_is_trained_from_behind_its_block(message, expected, kind):
    assert supervised(build(FAMILIES["qwen3"], kind), [Q, message]) == [expected]


def test_the_answers_own_white_space_carries_loss():
    message = answer("   code", reasoning_content="Hm.")
    assert supervised(tokenizer_of("qwen3"), [Q, message]) == ["   code<|im_end|>"]


def test_answers_without_reasoning_keep_their_whole_loss():
    said = "I like </think> and <think> tags."
    assert supervised(tokenizer_of("qwen2_5"), [Q, answer(said), Q, answer("No.")]) == [
        f"{said}<|im_end|>",
        "No.<|im_end|>",
    ]
    assert supervised(tokenizer_of("qwen3"), [Q, answer("One."), Q, answer("Two.")]) == [
        "One.<|im_end|>",
        "Two.<|im_end|>",
    ]


def test_reasoning_that_never_ends_is_the_answer():
    assert supervised(tokenizer_of("qwen2_5"), [Q, answer("<think>\nHm")]) == ["<think>\nHm<|im_end|>"]


def test_a_block_may_be_written_by_a_template_that_knows_none():
    """In Qwen2.5's tokenizer `</think>` is no token, and ">" may share one with the line breaks after it."""
    message = answer("<think>\nHm.\n</think>\n\nAye, friend.")
    assert supervised(tokenizer_of("qwen2_5"), [Q, message, Q, message]) == ["Aye, friend.<|im_end|>"] * 2


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6"])
def test_a_block_that_the_header_opens_ends_like_any_other(name):
    messages = [Q, answer("One.", reasoning_content="Hm."), Q, answer("Two.", reasoning_content="Ho.")]
    assert supervised(tokenizer_of(name), messages)[-1] == "Two.<|im_end|>"
    assert supervised(tokenizer_of(name), [Q, answer("Two.")]) == ["Two.<|im_end|>"]


def test_without_thinking_the_prompt_holds_the_block_and_the_answer_all_its_loss():
    tokenizer = build(FAMILIES["qwen3"], "bytes")
    tokenizer.chat_template = with_defaults(tokenizer.chat_template, {"enable_thinking": False})
    assert supervised(tokenizer, [Q, answer("Aye.")]) == ["Aye.<|im_end|>"]


def test_a_channel_of_its_own_ends_with_its_marker():
    """gpt-oss' manner: the model writes the header of its final channel itself."""
    source = (
        "{%- for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant{% if m.thinking %}<|channel|>analysis"
        "<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}<|channel|>final<|message|>"
        "{{ m.content }}<|return|>{% else %}<|start|>user<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    tokenizer = Tokenizer.from_str(trained("bytes"))
    special = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=source)
    messages = [Q, answer("One.", thinking="Hm."), Q, answer("Two.")]
    assert supervised(fast, messages) == [
        "<|start|>assistant<|channel|>final<|message|>One.<|return|>",
        "<|channel|>final<|message|>Two.<|return|>",
    ]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "deepseekv3", "phi3", *OTHERS])
def test_both_paths_agree_and_only_the_beginnings_of_answers_move(name):
    """On hostile conversations: ids and ends as ever; what is left out closes a block that was opened."""
    tokenizer = tokenizer_of(name)
    plain, encoder = ChatEncoder(tokenizer), ChatEncoder(tokenizer, after_thinking=True)
    rows = [Conversation(*row) for row in conversations({**FAMILIES, **OTHERS}[name], 400, seed=2)]
    random.Random(0).shuffle(rows)
    moved = 0
    for row, many in zip(rows, encoder.encode_batch(rows), strict=True):
        if isinstance(many, FormatError):
            continue
        one, before = encoder.encode(*row), plain.encode(*row)
        assert (list(many.input_ids), list(many.turns)) == (list(one.input_ids), list(one.turns)), row
        assert list(one.input_ids) == list(before.input_ids)
        assert len(one.turns) == len(assistant_turns(row.messages))
        for (start, stop), (begin, end) in zip(before.turns, one.turns, strict=True):
            assert (stop, start <= begin < stop) == (end, True)
            if begin > start:
                left_out = tokenizer.decode(one.input_ids[start:begin])
                assert "</think>" in left_out
                assert tokenizer.decode(one.input_ids[:begin]).rstrip("\n").count("<think>")
                moved += 1
    assert (moved > 20) == ("qwen3" in name), moved


@pytest.mark.parametrize(
    ("name", "message", "is_left_out"),
    [
        ("deepseek_r1_distill", answer("<think>\nHm.\n</think>\n\nAye."), True),
        ("deepseek_r1_distill", answer("Aye.", reasoning_content="Hm."), True),
        ("deepseek_r1_distill", answer("Aye."), False),
        ("qwen2_5", answer("<think>\nHm.\n</think>\n\nAye."), False),
        ("qwen2_5", answer("Aye.", reasoning_content="Hm."), True),
        ("qwen3", answer("Aye.", reasoning_content="Hm."), False),
    ],
)
def test_reasoning_that_a_template_writes_in_no_answer_is_noticed(name, message, is_left_out):
    encoder = ChatEncoder(build(FAMILIES[name], "bytes"))
    assert encoder.leaves_out_reasoning(Conversation([Q, message])) is is_left_out
    assert not encoder.leaves_out_reasoning(Conversation([Q, message], None, frozenset({1})))  # a mere context


def test_template_of_the_r1_recipe_trains_reasoning_and_prompts_as_the_models_own():
    own = build(FAMILIES["deepseek_r1_distill"], "bytes")
    ours = build(FAMILIES["deepseek_r1_distill"], "bytes")
    ours.chat_template = R1.read_text(encoding="utf-8")
    thought, fielded, plain = (
        answer("<think>\nHm.\n</think>\n\nAye."), answer("Aye.", reasoning_content="Hm."), answer("Aye."),
    )  # fmt: skip
    assert supervised(ours, [Q, thought]) == supervised(ours, [Q, fielded]) == ["Aye.<｜end▁of▁sentence｜>"]
    ids, turns, _ = ChatEncoder(ours).encode([Q, thought])
    assert [ours.decode(ids[a:b]) for a, b in turns] == ["Hm.\n</think>\n\nAye.<｜end▁of▁sentence｜>"]
    ids, turns, _ = ChatEncoder(ours).encode([Q, plain])
    assert [ours.decode(ids[a:b]) for a, b in turns] == ["\n</think>\n\nAye.<｜end▁of▁sentence｜>"]
    for history in ([Q], [{"role": "system", "content": "S\n"}, Q, thought, Q], [Q, plain, Q]):
        assert ChatEncoder(ours).encode_prompt(history) == ChatEncoder(own).encode_prompt(history)
