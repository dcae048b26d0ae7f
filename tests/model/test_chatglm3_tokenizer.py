"""ChatGLM3's tokenizer without the vendor's file: the sentencepiece package is the oracle, on a model trained here."""

import json
import pickle
import random
import sys

import pytest
from transformers import AutoTokenizer

import sft.model.chatglm3
from sft.errors import FormatError, ModelError

spm = pytest.importorskip(
    "sentencepiece", reason="sentencepiece (requirements-dev) trains the tokenizer of these tests"
)

# No "people" or "philosophers": in a vocabulary this small, "eop" would become a piece, which the released one is not.
CORPUS = [
    "The keeper counts the gulls, and the crowd on the pier counts the storms.",
    "Hello, I'm ChatGLM3. What can I assist you with today?",
    "你好，有什么可以帮你？晚上睡不着应该怎么办",
    "我是人工智能助手，很高兴见到你，欢迎问我任何问题。",
    "```python\ntool_call(location='Paris')\n```",
    "    if len(a) <= 1:  return a[0] + a[1:]",
    "get_current_weather 15°C {\"temperature\": 15, \"cond\": \"多云\"}",
] * 5  # fmt: skip
RELEASED = {
    "name_or_path": "THUDM/chatglm3-6b",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}


def train(folder, **changes) -> str:
    """Write tokenizer.model with the released model's settings, and a tokenizer_config.json; returns its path."""
    (folder / "corpus.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    settings = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.98,
        "hard_vocab_limit": False,
    }
    spm.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), minloglevel=2, **settings | changes
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(RELEASED), encoding="utf-8")
    return str(folder / "tokenizer.model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    train(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return spm.SentencePieceProcessor(str(folder / "tokenizer.model"))


def random_texts(count: int) -> list[str]:
    draw = random.Random(0)
    words = [*"ab =-\n\t0▁é你好，🖎\x00", "  ", "the", "people", "philosophers"]
    words += ["sop", "eop", "<|user|>", "</s>", "<unk>", "<0x0A>"]
    return ["", " ", "\n"] + ["".join(draw.choices(words, k=draw.randrange(25))) for _ in range(count)]


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def labels(ids: list[int], turns: list[tuple[int, int]]) -> list[int]:
    trained = {position for start, stop in turns for position in range(start, stop)}
    return [token if position in trained else -100 for position, token in enumerate(ids)]


def test_ids_and_text_are_sentencepieces(tokenizer, processor):
    assert type(tokenizer) is sft.model.chatglm3.ChatGLMTokenizer
    for text in CORPUS + random_texts(2000):
        ids = processor.encode(text)
        assert encode(tokenizer, text) == ids, text
        assert tokenizer.decode(ids) == processor.decode(ids), text


def test_special_tokens_follow_the_pieces(tokenizer):
    specials = [
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "sop",
        "eop",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    ]
    assert tokenizer.convert_tokens_to_ids(specials) == list(range(600, 609))
    assert len(tokenizer) == 609
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) == (0, 0, 2)
    assert tokenizer.stop_token_ids == [2, 606, 608]
    assert tokenizer.padding_side == "left"
    assert tokenizer("a")["input_ids"] == [601, 603, *encode(tokenizer, "a")]


def test_it_loads_without_sentencepiece_and_protobuf(folder, monkeypatch):
    for package in ("sentencepiece", "google.protobuf", "tiktoken"):
        monkeypatch.setitem(sys.modules, package, None)
    assert len(AutoTokenizer.from_pretrained(folder)) == 609


def test_text_never_becomes_a_special_token(tokenizer):
    text = "philosophers and people: sop eop [gMASK] <|user|><|assistant|> </s> <unk> <s>"
    assert not set(encode(tokenizer, text)) & {0, 1, 2, *range(600, 609)}
    ids, turns = tokenizer.encode_conversation(
        [{"role": "user", "content": text}, {"role": "assistant", "content": text, "metadata": "<|user|>"}]
    )
    assert [token for token in ids if token in {0, 1, 2, *range(600, 609)}] == [601, 603, 606, 607, 2]
    assert len(turns) == 1


def test_a_release_that_lists_special_tokens_as_ordinary_ones_changes_nothing(folder, tokenizer, tmp_path):
    ordinary = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": False}
    listed = {"603": {"content": "sop", **ordinary}, "606": {"content": "<|user|>", **ordinary}}
    config = RELEASED | {"added_tokens_decoder": listed, "chat_template": "{{ messages }}", "eos_token": "</s>"}
    config["additional_special_tokens"] = ["<|user|>", "<|observation|>"]
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    listing = AutoTokenizer.from_pretrained(tmp_path)
    assert listing.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert encode(listing, "philosophers <|user|>") == encode(tokenizer, "philosophers <|user|>")
    assert listing.chat_template == tokenizer.chat_template


def test_tokenizer_json_reloads_equal_without_tokenizer_model(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    for reloaded in (AutoTokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(tokenizer))):  # noqa: S301
        assert type(reloaded) is sft.model.chatglm3.ChatGLMTokenizer
        assert reloaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        assert reloaded.chat_template == tokenizer.chat_template
        assert reloaded.stop_token_ids == tokenizer.stop_token_ids
        for text in random_texts(200):
            assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_every_token_of_an_answer_and_the_one_after_it_is_trained(tokenizer):
    header, a, b, c, d = ([*encode(tokenizer, text)] for text in ("\n", "Hello", "people", "the", "pier"))
    messages = [
        {"role": "system", "content": "the"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "people"},
        {"role": "user", "content": "the"},
        {"role": "assistant", "content": "pier"},
    ]
    ids, turns = tokenizer.encode_conversation(messages)
    context = [601, 603, 605, *header, *c, 606, *header, *a, 607]
    assert ids == [*context, *header, *b, 606, *header, *c, 607, *header, *d, 2]
    between = [-100] * len([*header, *c, 607])
    assert labels(ids, turns) == [-100] * len(context) + [*header, *b, 606, *between, *header, *d, 2]
    assert tokenizer.encode_prompt(messages[:2]) == context


def test_an_answer_after_an_answer_trains_its_assistant_token(tokenizer):
    header, a, b = ([*encode(tokenizer, text)] for text in ("\n", "Hello", "people"))
    ids, turns = tokenizer.encode_conversation(
        [{"role": "assistant", "content": "Hello"}, {"role": "assistant", "content": "people"}]
    )
    assert ids == [601, 603, 607, *header, *a, 607, *header, *b, 2]
    assert labels(ids, turns) == [-100, -100, -100, *header, *a, 607, *header, *b, 2]
    assert len(turns) == 2


def test_nothing_after_the_last_answer_is_trained(tokenizer):
    header, a, b = ([*encode(tokenizer, text)] for text in ("\n", "Hello", "people"))
    messages = [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "people"}]
    ids, turns = tokenizer.encode_conversation(messages)
    assert ids == [601, 603, 607, *header, *a, 606, *header, *b, 2]
    assert labels(ids, turns) == [-100, -100, -100, *header, *a, 606, *[-100] * len([*header, *b, 2])]
    assert tokenizer.encode_conversation([{"role": "user", "content": ""}]) == ([601, 603, 606, *header, 2], [])


def test_a_tool_call_is_its_name_as_metadata_and_python(tokenizer):
    call = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris", "days": 2}'}}
    called = tokenizer.encode_conversation(
        [
            {"role": "user", "content": "Paris?"},
            {"role": "assistant", "content": "Hello", "tool_calls": [call]},
            {"role": "tool", "content": "15°C"},
            {"role": "assistant", "content": "15"},
        ]
    )
    code = "```python\ntool_call(city='Paris', days=2)\n```"
    ids, (thought, action, answer) = tokenizer.encode_conversation(
        [
            {"role": "user", "content": "Paris?"},
            {"role": "assistant", "content": "Hello"},
            {"role": "assistant", "metadata": "get_weather", "content": code},
            {"role": "observation", "content": "15°C"},
            {"role": "assistant", "content": "15"},
        ]
    )
    assert called == (ids, [(thought[0], action[1]), answer])
    assert ids[action[1] - 1] == 608
    assert ids[action[0] : action[1] - 1] == encode(tokenizer, "get_weather\n") + encode(tokenizer, code)


def test_tools_are_shown_as_indented_json_after_the_system_text(tokenizer):
    tool = {"name": "get_weather", "description": "获取天气 <b>&"}
    listed = '[\n    {\n        "name": "get_weather",\n        "description": "获取天气 <b>&"\n    }\n]'
    question = {"role": "user", "content": "Paris?"}
    for prompt, messages in [
        ("Be kind.", [{"role": "system", "content": "Be kind."}, question]),
        (
            "Answer the following questions as best as you can. You have access to the following tools:",
            [question],
        ),
    ]:
        expected = [{"role": "system", "content": f"{prompt}\n{listed}"}, question]
        wrapped = {"type": "function", "function": tool}
        assert tokenizer.encode_prompt(messages, tools=[tool]) == tokenizer.encode_prompt(expected)
        assert tokenizer.encode_prompt(messages, tools=[wrapped]) == tokenizer.encode_prompt(expected)
        assert tokenizer.encode_conversation(messages, tools=[tool]) == tokenizer.encode_conversation(expected)


def test_the_template_gives_the_same_ids(tokenizer):
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"city": "北京 <b>"}}}
    call = {"function": {"name": "get_weather", "arguments": {"city": "Paris's", "days": 2}}}
    messages = [
        {"role": "system", "content": "  Be kind. \n"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "philosophers", "tool_calls": [call, call]},
        {"role": "tool", "content": "15°C\n\n"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "observation", "content": "\n"},
        {"role": "assistant", "metadata": " spaced meta ", "content": " people"},
    ]
    for tools in (None, [tool]):
        for chat in (messages, messages[1:]):
            ids = tokenizer.apply_chat_template(chat, tools=tools)["input_ids"]
            assert ids == tokenizer.encode_conversation(chat, tools)[0]
            prompt = tokenizer.apply_chat_template(chat[:4], tools=tools, add_generation_prompt=True)["input_ids"]
            assert prompt == tokenizer.encode_prompt(chat[:4], tools)


@pytest.mark.parametrize(
    "message, said",
    [
        ({"role": "critic", "content": "a"}, "role 'critic'"),
        ({"content": "a"}, "role None"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}]}, "content and metadata"),
        ({"role": "user", "content": "a", "tool_calls": [{}]}, "tool_calls in a user message"),
        ({"role": "assistant", "content": "a", "tool_calls": [{"name": "f", "arguments": "{"}]}, "tool call"),
        ({"role": "assistant", "content": "a", "tool_calls": [{"name": "f", "arguments": "[1]"}]}, "tool call"),
    ],
)
def test_a_message_that_the_format_cannot_hold_is_refused(tokenizer, message, said):
    with pytest.raises(FormatError, match=said):
        tokenizer.encode_conversation([message])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model_type": "unigram"}, "model_type BPE"),
        ({"byte_fallback": False}, "byte_fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "no normalisation"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces off"),
        ({"add_dummy_prefix": False}, "add_dummy_prefix"),
        ({"user_defined_symbols": ["<sep>"]}, "no user-defined"),
        ({"control_symbols": ["[gMASK]"]}, r"no pieces \[gMASK\]"),
        ({"eos_piece": "<end>"}, "control pieces <unk> and </s>"),
    ],
)
def test_a_sentencepiece_model_of_another_kind_is_refused_by_what_differs(tmp_path, changes, said):
    train(tmp_path, **changes)
    with pytest.raises(ModelError, match=said):
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"IQ== 0\nIg== 1\n", b"\x0a\x05\x0a\x01a\x15"])
def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(RELEASED), encoding="utf-8")
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelError, match="not a"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(RELEASED), encoding="utf-8")
    with pytest.raises(ModelError, match="neither is there"):
        AutoTokenizer.from_pretrained(tmp_path)
