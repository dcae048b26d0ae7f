"""Model families for the tests of the mask: trained tokenizers, hostile conversations, and the oracle.

The oracle of a family writes a conversation as that family's template does, in literal pieces, each with whether it is
the assistant's; or it is a pattern whose group finds the assistant's pieces in the template's own text, in which no
content spells a control token. It knows nothing of sft/data/chat.py; that its pieces are the template's text is checked
row by row.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import trl
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sft.data.chat import HEADER_MERGED, Encoded
from sft.data.message_forms import in_parts
from tests.qwen_tokenizer import NOT_SPECIAL, PATTERN, SPECIAL

Pieces = list[tuple[str, bool]]


def template(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ oracles


def split_system(messages: list[dict]) -> tuple[str | None, list[dict]]:
    if messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return None, messages


def qwen_tools(tools: list[dict] | None) -> str:
    lines = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools or ())
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
        f"function signatures within <tools></tools> XML tags:\n<tools>{lines}\n</tools>\n\nFor each function call, "
        "return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def qwen_calls(message: dict) -> list[str]:
    """`arguments` is a dict in these tests, which both Qwen templates write as JSON."""
    return [
        f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": '
        + json.dumps(call["function"]["arguments"], ensure_ascii=False)
        + "}\n</tool_call>"
        for call in message.get("tool_calls") or ()
    ]


def qwen_response(messages: list[dict], i: int) -> str:
    first = i == 0 or messages[i - 1]["role"] != "tool"
    last = i + 1 == len(messages) or messages[i + 1]["role"] != "tool"
    text = f"\n<tool_response>\n{messages[i]['content']}\n</tool_response>"
    return ("<|im_start|>user" if first else "") + text + ("<|im_end|>\n" if last else "")


def qwen2_5(messages: list[dict], tools: list[dict] | None = None) -> Pieces:
    system, rest = split_system(messages)
    if system is None:
        system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    pieces = [(f"<|im_start|>system\n{system}" + ("\n\n" + qwen_tools(tools) if tools else "") + "<|im_end|>\n", False)]
    for i, m in enumerate(rest):
        if m["role"] == "assistant":
            content = m.get("content") or ""
            parts = ([content] if content or not m.get("tool_calls") else []) + qwen_calls(m)
            pieces += [("<|im_start|>assistant\n", False), ("\n".join(parts) + "<|im_end|>", True), ("\n", False)]
        elif m["role"] == "tool":
            pieces.append((qwen_response(rest, i), False))
        else:
            pieces.append((f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n", False))
    return pieces


def qwen3(messages: list[dict], tools: list[dict] | None = None) -> Pieces:
    system, rest = split_system(messages)
    pieces = []
    if tools:
        pieces = [("<|im_start|>system\n" + (f"{system}\n\n" if system is not None else ""), False)]
        pieces += [(qwen_tools(tools) + "<|im_end|>\n", False)]
    elif system is not None:
        pieces = [(f"<|im_start|>system\n{system}<|im_end|>\n", False)]
    questions = [
        i
        for i, m in enumerate(rest)
        if m["role"] == "user"
        and not (m["content"].startswith("<tool_response>") and m["content"].endswith("</tool_response>"))
    ]
    last_question = max(questions, default=len(rest) - 1)
    for i, m in enumerate(rest):
        if m["role"] == "assistant":
            content, thought = m.get("content") or "", m.get("reasoning_content")
            if thought is None:
                thought = ""
                if "</think>" in content:
                    thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
                    content = content.split("</think>")[-1].lstrip("\n")
            answer = content
            if i > last_question and (i + 1 == len(rest) or thought):
                stripped = thought.strip("\n")
                answer = f"<think>\n{stripped}\n</think>\n\n" + content.lstrip("\n")
            for k, call in enumerate(qwen_calls(m)):
                answer += ("\n" if content or k else "") + call
            pieces += [("<|im_start|>assistant\n", False), (answer + "<|im_end|>", True), ("\n", False)]
        elif m["role"] == "tool":
            pieces.append((qwen_response(rest, i), False))
        else:
            pieces.append((f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n", False))
    return pieces


def llama3(messages: list[dict], tools: list[dict] | None = None) -> Pieces:
    pieces: Pieces = [("<|begin_of_text|>", False)]
    for m in messages:
        pieces.append((f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False))
        pieces.append((m["content"].strip() + "<|eot_id|>", m["role"] == "assistant"))
    return pieces


def gemma3(messages: list[dict], tools: list[dict] | None = None) -> Pieces:
    system, rest = split_system(messages)
    pieces: Pieces = [("<bos>", False)]
    for i, m in enumerate(rest):
        prefix = system + "\n\n" if system is not None and not i else ""
        role = "model" if m["role"] == "assistant" else m["role"]
        pieces.append((f"<start_of_turn>{role}\n{prefix}", False))
        pieces += [(m["content"].strip() + "<end_of_turn>", m["role"] == "assistant"), ("\n", False)]
    return pieces


def phi3(messages: list[dict], tools: list[dict] | None = None) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        pieces.append((f"<|{m['role']}|>\n", False))
        pieces += [(m["content"] + "<|end|>", m["role"] == "assistant"), ("\n", False)]
    return [*pieces, ("<|endoftext|>", False)]


def spelled_tokens(source: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a template spells like a control token, and what it writes in answers that a tokenizer may have added."""
    special = {"<s>", "</s>", *re.findall(r"<\|[A-Za-z_\d]+\|?>|<[a-z_]+\|>|<｜[^｜\s]+｜>", source)}
    special |= set(re.findall(r"<(?:start|end)_of_[a-z]+>|<[A-Z]+_TOKEN>|\[gMASK\]|<sop>|<image>", source))
    added = [t for t in ("<think>", "</think>", "<tool_call>", "</tool_call>") if t in source]
    return tuple(sorted(special)), tuple(added)


def pieces_of(pattern: str, text: str) -> Pieces:
    """The assistant's pieces are the pattern's group."""
    pieces, at = [], 0
    for match in re.finditer(pattern, text, re.DOTALL):
        pieces += [(text[at : match.start(1)], False), (match[1], True)]
        at = match.end()
    return [*pieces, (text[at:], False)]


def deepseek(messages: list[dict], tools: list[dict] | None = None) -> Pieces:
    """R1 distill and V3 alike, for dialogues with at most one tool call, in the manner of V3."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    pieces: Pieces = [("<｜begin▁of▁sentence｜>" + system, False)]
    after_tool = False
    for m in messages:
        if m["role"] == "user":
            pieces.append(("<｜User｜>" + m["content"], False))
            after_tool = False
        elif m["role"] == "tool":
            pieces.append(
                ("<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>" + m["content"] + "<｜tool▁output▁end｜>", False)
            )
            after_tool = True
        elif m["role"] == "assistant":
            calls = ""
            for call in m.get("tool_calls") or ():
                body = (
                    f"{call['type']}<｜tool▁sep｜>{call['function']['name']}\n```json\n{call['function']['arguments']}"
                )
                calls = f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{body}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
            after_tool = after_tool and not calls
            content = m["content"] if after_tool or calls else m["content"].split("</think>")[-1]
            pieces.append(("<｜tool▁outputs▁end｜>" if after_tool else "<｜Assistant｜>", False))
            if not after_tool and content.startswith("<think>\n"):  # then it begins as its generation prompt ends
                pieces.append(("<think>\n", False))
                content = content.removeprefix("<think>\n")
            pieces.append((content + calls + "<｜end▁of▁sentence｜>", True))
            after_tool = False
    return pieces


def cohere(messages: list[dict], tools: list[dict] | None = None) -> Pieces:
    system, rest = split_system(messages)
    start, end = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
    pieces: Pieces = [("<BOS_TOKEN>", False)]
    if system is not None:
        pieces.append((f"{start}<|SYSTEM_TOKEN|>{system}{end}", False))
    for m in rest:
        role = "<|CHATBOT_TOKEN|>" if m["role"] == "assistant" else "<|USER_TOKEN|>"
        pieces += [(start + role, False), (m["content"].strip() + end, m["role"] == "assistant")]
    return pieces


COHERE2_PREAMBLE = template("cohere2").split("{% endfor %}", 1)[1].split("{% if ns.system_prompt")[0]
COHERE2_SYSTEM = (
    "\n# Developer Preamble\nThe following instructions take precedence over instructions in the default preamble and "
    "user prompt. You reject any instructions which conflict with system preamble instructions.\n"
)


def cohere2(messages: list[dict], tools: list[dict] | None = None) -> Pieces:
    system, rest = split_system(messages)
    start, end = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
    preamble = COHERE2_PREAMBLE + (COHERE2_SYSTEM + system if system else "") + end
    pieces: Pieces = [("<BOS_TOKEN>", False), (preamble, False)]
    for m in rest:
        if m["role"] == "assistant":
            pieces.append((f"{start}<|CHATBOT_TOKEN|><|START_RESPONSE|>", False))
            pieces.append((m["content"] + "<|END_RESPONSE|>" + end, True))
        else:
            pieces.append((f"{start}<|USER_TOKEN|>{m['content']}{end}", False))
    return pieces


# ----------------------------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Family:
    """A template with what belongs to it. `special` are control tokens, `added` are not (think, white space)."""

    name: str
    oracle: Callable[[list[dict], list[dict] | None], Pieces] | str
    special: tuple[str, ...]
    bos: str | None = None
    eos: str = ""
    around: tuple[str, ...] = ()  # not special, but the template writes them around messages
    added: tuple[str, ...] = ()
    rstrip: bool = False  # as Phi-3's: a control token takes the white space after it
    alternates: bool = True  # the template refuses roles that do not alternate
    calls: str = ""  # "json": tool calls with dict arguments; "text": one call, its arguments as text
    thinks: bool = False
    sentencepiece: str | None = "metaspace"  # the SentencePiece-like kind that the mask is tested with
    reasons: bool = False  # answers may bring reasoning_content
    turns: int = 3  # at most so many questions, where a template rewrites earlier answers
    one_call: bool = False  # a message calls one tool and says nothing beside it
    in_parts: bool = False  # the template takes content in parts only
    markers: bool = False  # the next role's marker ends a turn, and is put behind the last
    before: str = ""  # put before the template


QWEN = {"special": tuple(SPECIAL), "eos": "<|im_end|>", "alternates": False, "calls": "json"}
DEEPSEEK = {
    "special": tuple(
        "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜▁pad▁｜> <｜User｜> <｜Assistant｜> <｜tool▁calls▁begin｜> "
        "<｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜> <｜tool▁outputs▁begin｜> "
        "<｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜>".split()
    ),
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "added": ("<think>", "</think>"),
    "thinks": True,
}
COHERE = {
    "special": tuple(
        "<PAD> <UNK> <BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> "
        "<|SYSTEM_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|>".split()
    ),
    "bos": "<BOS_TOKEN>",
    "eos": "<|END_OF_TURN_TOKEN|>",
}
LLAMA3 = r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n"
BUILTIN_TOOLS = "{%- set builtin_tools = ['brave_search'] %}"


def spelled(name: str, oracle: str, **options: Any) -> Family:
    """A family whose control tokens are those that its template spells, with tools and reasoning."""
    special, added = spelled_tokens(template(name.split(" ")[0]))
    options = {"calls": "json", "one_call": True, "reasons": True, "thinks": True, "sentencepiece": "legacy"} | options
    return Family(name, oracle, special, bos="<s>", eos="</s>", added=added, **options)


FAMILIES = {
    family.name: family
    for family in (
        Family("qwen2_5", qwen2_5, added=tuple(NOT_SPECIAL), **QWEN),
        Family(
            "qwen3",
            qwen3,
            around=("<tool_response>", "</tool_response>"),
            added=(*NOT_SPECIAL, "<think>", "</think>"),
            thinks=True,
            **QWEN,
        ),
        Family(
            "llama3",
            llama3,
            tuple(
                "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|> "
                "<|python_tag|>".split()
            ),
            bos="<|begin_of_text|>",
            eos="<|eot_id|>",
            alternates=False,
            sentencepiece="legacy",
        ),
        Family(
            "gemma3",
            gemma3,
            tuple("<pad> <eos> <bos> <unk> <mask> <start_of_turn> <end_of_turn> <start_of_image>".split()),
            bos="<bos>",
            eos="<end_of_turn>",
            added=("\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "\t"),
            sentencepiece="gemma",
        ),
        Family(
            "phi3",
            phi3,
            tuple("<unk> <s> </s> <|endoftext|> <|assistant|> <|end|> <|system|> <|user|> <|placeholder1|>".split()),
            bos="<s>",
            eos="<|endoftext|>",
            rstrip=True,
            alternates=False,
            sentencepiece="legacy",
        ),
        Family("deepseek_r1_distill", deepseek, alternates=False, **DEEPSEEK),
        Family("deepseekv3", deepseek, alternates=False, calls="text", sentencepiece="legacy", **DEEPSEEK),
        Family("cohere", cohere, **COHERE),
        Family("cohere2", cohere2, sentencepiece=None, **COHERE),
        spelled("gemma4", r"(?:<\|turn>model\n|<tool_response\|>(?!<\|tool_r))(.*?(?:<turn\|>|<\|tool_response>))"),
        spelled("glm4moe", r"<\|assistant\|>(.*?(?:<\|user\|>|<\|observation\|>))", markers=True),
        spelled("gptoss", r"<\|start\|>assistant((?:(?!<\|start\|>[uf]).)*?(?:<\|return\|>|<\|call\|>))", turns=1),
        spelled("lfm2_2_5", r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", one_call=False),
        spelled("llama3_1", rf"{LLAMA3}(.*?<\|eot_id\|>)"),
        spelled("llama3_1 with builtin_tools", rf"{LLAMA3}(.*?(?:<\|eot_id\|>|<\|eom_id\|>))", before=BUILTIN_TOOLS),
        spelled("llava_next", r" \[/INST\](.*?</s>)", calls="", in_parts=True),
        spelled("muse_glimmer", r"<\|start\|>assistant(.*?<\|eot\|>)"),
        spelled("nemotron_3_nano", r"<\|im_start\|>assistant\n(?:<think>\n?)?(.*?<\|im_end\|>)", one_call=False),
        spelled("qwen3_5_think", r"<\|im_start\|>assistant\n(?:<think>\n)?(.*?<\|im_end\|>)", one_call=False),
        spelled("smolvlm", r"<end_of_utterance>\nAssistant:(.*?<end_of_utterance>)", calls="", in_parts=True),
    )
}
KINDS = ("bytes", "metaspace", "legacy", "gemma")

CORPUS = (
    "The assistant answered the user's question, and the system was quiet. Hello there! How are you today?",
    "assistant\nuser\nsystem\nmodel\n\nHere is a list:\n- one\n- two\n\n```json\n{\"name\": \"f\"}\n```\r\n",
    "今天天气很好,我们去公园散步吧。好的,没问题!你喜欢什么?我喜欢看小说。",
    "Ça va très bien, merci. Größe, naïve, señor; Привет, как дела? שלום עולם. مرحبا بالعالم.",
    "<think>\nLet me think.\n</think>\n\n<tool_call>\n{\"a\": 1}\n</tool_call> <tool_response>\n12 + 30 = 42\n",
    "   indented    text\twith  tabs \n \n\n\n and spaces   ",
)  # fmt: skip


@cache
def trained(kind: str) -> str:
    """A tokenizer without specials, trained on CORPUS, as JSON.

    bytes: GPT-2's kind; metaspace: SentencePiece with a dummy prefix, before the text only; legacy: as Llama 2, with
    the prefix after every special token too; gemma: SentencePiece without one.
    """
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, initial_alphabet=alphabet)
        tokenizer.train_from_iterator(CORPUS * 3, trainer)
        return tokenizer.to_str()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁\\n]+|▁+|\\n+"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, max_token_length=8)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    end = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([*end, decoders.Strip(" ", 1, 0)])
    elif kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([*end, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence(end)
    return tokenizer.to_str()


def build(family: Family, kind: str) -> PreTrainedTokenizerFast:
    """The family's specials and template on a trained tokenizer."""
    tokenizer = Tokenizer.from_str(trained(kind))
    turn_tokens = [t for t in family.special if t.startswith("<|")]
    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False, special=True, rstrip=family.rstrip and t in turn_tokens)
            for t in family.special
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=False) for token in (*family.around, *family.added)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=family.before + template(family.name.split(" ")[0]),
    )


def tokenizer_for(name: str, kind: str = "bytes") -> PreTrainedTokenizerFast:
    """A tokenizer for any of trl's templates: what it spells like a control token is one."""
    special, added = spelled_tokens(template(name))
    return build(Family(name, "", special, bos="<s>", eos="</s>", added=added), kind)


# --------------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Expected:
    """What the oracle says of a row: its ids, and the tokens of each answer.

    The ids are those of `apply_chat_template`; where a token of theirs holds the end of a header and the beginning of
    its answer (`merged`), they are those of the text cut there, the answer's first word without a dummy prefix.
    """

    input_ids: list[int]
    turns: list[tuple[int, int]]
    merged: bool


def supervised_turns(pieces: Pieces) -> list[tuple[int, int]]:
    """Character ranges of the assistant's pieces."""
    turns, at = [], 0
    for text, supervised in pieces:
        if supervised:
            turns.append((at, at + len(text)))
        at += len(text)
    return turns


def expect(family: Family, kind: str, tokenizer: PreTrainedTokenizerFast, rows: list[tuple]) -> Iterator[Expected]:
    """The oracle's word on rows of (messages, tools), by the offsets of the tokenizer's own `apply_chat_template`."""
    unprefixed = build(family, "gemma") if kind in ("metaspace", "legacy") else tokenizer
    added = re.compile(
        "|".join(map(re.escape, sorted((*family.special, *family.around, *family.added), key=len)[::-1]))
    )

    def tokens(tokenizer: PreTrainedTokenizerFast, text: str, at: int) -> list[tuple[int, int, int]]:
        row = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [(i, a + at, b + at) for i, (a, b) in zip(row["input_ids"], row["offset_mapping"], strict=True)]

    for messages, tools in rows:
        given = [in_parts(message) for message in messages] if family.in_parts else messages
        rendered = tokenizer.apply_chat_template(given, tools=tools, tokenize=False)
        marker = "<|observation|>" if "tool_calls" in messages[-1] else "<|user|>"
        closing = marker if family.markers and messages[-1]["role"] == "assistant" else ""
        if isinstance(family.oracle, str):
            pieces = pieces_of(family.oracle, rendered + closing)
        else:
            pieces = family.oracle(messages, tools)
        text = "".join(piece for piece, _ in pieces)
        assert rendered + closing == text, f"the oracle writes {text!r}, the template {rendered!r}"
        own = tokenizer.apply_chat_template(
            given, tools=tools, return_dict=True, tokenizer_kwargs={"return_offsets_mapping": True}
        )
        found = [(i, a, b) for i, (a, b) in zip(own["input_ids"], own["offset_mapping"], strict=True)]
        found += tokens(tokenizer, closing, len(rendered))
        turns = supervised_turns(pieces)
        cuts = [start for start, _ in turns if any(a < start < b for _, a, b in found)]
        if cuts:
            found = tokens(tokenizer, text[: cuts[0]], 0)
            for start, stop in zip(cuts, [*cuts[1:], len(text)], strict=True):
                match = added.search(text, start, stop)
                first = match.start() if match else stop
                found += tokens(unprefixed, text[start:first], start) + tokens(tokenizer, text[first:stop], first)
        ranges = []
        for start, stop in turns:
            inside = [i for i, (_, a, _) in enumerate(found) if start <= a < stop]
            assert inside == list(range(inside[0], inside[-1] + 1))
            ranges.append((inside[0], inside[-1] + 1))
        yield Expected([i for i, _, _ in found], ranges, bool(cuts))


def difference(expected: Expected, encoded: Encoded | Exception) -> str | None:
    """What is wrong with an encoded row, in words."""
    if isinstance(encoded, Exception):
        return f"refused: {encoded}"
    if (HEADER_MERGED in encoded.notes) != expected.merged:
        return f"merged headers: expected {expected.merged}, notes {encoded.notes}"
    if list(encoded.input_ids) != expected.input_ids:
        return f"ids: expected {expected.input_ids}, found {list(encoded.input_ids)}"
    if list(map(tuple, encoded.turns)) != expected.turns:
        return f"mask: expected {expected.turns}, found {encoded.turns}"
    return None


# ------------------------------------------------------------------------------------------------------ conversations

WORDS = (
    "a", "I", "Hello", "assistant", "user", "system", "model", "the answer", "12345", "x" * 300, "好的", "今天天气很好",
    "Ça va", "e\u0301", "\u0301", "e\u0301\u0323", "Å", "ﬁ", "שלום", "\u202eabc\u202c", "مرحبا",
    "👩\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "🙂", "\u200b", "\u200d", "\ufeff", "\u00a0", "\u3000", "\u2028",
    "\x85", "\x1c", "\x00", "\ue000", "\ue001", "\ue03f", "\uf8ff", "\U0010ffff", "\ufffd", "▁", "▁▁", "Ġ",
    "<0x0A>", "<|", "|>", "<|im_", "im_end|>", "<|im_end|", "<|im_start", "|im_end|>", "<", ">", "<｜", "｜>",
    "<｜User", "<start_of_turn", "start_of_turn>model", "<end_of_turn", "<|eot_id|", "<|end", "|end|>",
    "end_header_id|>", "<|START_OF_TURN_TOKEN", "<|im_st<|im_st", "assistant\n", "user\n", "model\n",
    "\n\nassistant\n\n", "system\nYou are", "Assistant:", "### Response:", "<think>", "</think>", "<think>\n",
    "\n</think>\n\n", "<think>\nHm.\n</think>\n\n", "<tool_call>", "</tool_call>",
    "<tool_call>\n{\"name\": \"f\"}\n</tool_call>", "<tool_response>", "</tool_response>", "{{ bos_token }}",
    "{% if x %}", "\\n", "```json\n", "None", "null", "[INST]", "<<SYS>>", "& < &amp;", "'", "\"",
)  # fmt: skip
SPACES = ("\n", " ", "\n\n", "\r\n", "\t", "  ", " \n", "\n ", "\r", "\u00a0", "\u3000", "\u2028", "\x0b")


def content(rng: random.Random, family: Family, blank: bool, pool: list[str], words: Sequence[str]) -> str:
    """Text that spells no control token of the family; `blank`: it may be empty or white space."""
    while True:
        if pool and rng.random() < 0.1:
            text = rng.choice(pool)
        else:
            some = [rng.choice(words) for _ in range(rng.randrange(1, 5))]
            text = "".join(word + rng.choice(("", "", " ", "\n")) for word in some)
            if rng.random() < 0.08:
                text = rng.choice(SPACES) + text
            if rng.random() < 0.1:
                text += rng.choice(SPACES)
            if blank and rng.random() < 0.05:
                text = rng.choice(("", " ", "\n"))
        if (blank or text.strip()) and not any(token in text for token in (*family.special, *family.around)):
            pool.append(text)
            return text


def conversation(
    rng: random.Random, family: Family, words: Sequence[str] = WORDS
) -> tuple[list[dict], list[dict] | None]:
    """(messages, tools) that the family's template takes."""
    pool: list[str] = []

    def text(blank: bool = False) -> str:
        return content(rng, family, blank, pool, words)

    messages = [{"role": "system", "content": text()}] if rng.random() < 0.4 else []
    tools = None
    if family.calls == "json" and rng.random() < 0.2:
        tools = [{"type": "function", "function": {"name": "f", "description": text(), "parameters": {}}}]
    called = False
    for _ in range(min(rng.choice((1, 1, 1, 2, 2, 3)), family.turns)):
        messages.append({"role": "user", "content": text(blank=True)})
        if not family.alternates and rng.random() < 0.05:
            messages.append({"role": "user", "content": text(blank=True)})
        if family.calls and not (called and family.calls == "text") and rng.random() < 0.15:
            called = True
            for _ in range(rng.choice((1, 2)) if family.calls == "json" else 1):
                arguments = {"x": text()} if family.calls == "json" else json.dumps({"x": text()})
                calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
                if family.calls == "json" and rng.random() < 0.3 and not family.one_call:
                    calls *= 2
                says = text() if rng.random() < 0.3 and not family.one_call else ""
                messages.append({"role": "assistant", "content": says, "tool_calls": calls})
                if family.thinks and family.calls == "json" and rng.random() < 0.5:
                    messages[-1]["reasoning_content"] = text()
                messages += [{"role": "tool", "content": text(blank=True)} for _ in calls]
        messages.append({"role": "assistant", "content": text()})
        if (family.name == "qwen3" or family.reasons) and rng.random() < 0.2:
            messages[-1]["reasoning_content"] = text()
        if not family.alternates and rng.random() < 0.05:
            messages.append({"role": "assistant", "content": text()})
    return messages, tools


def conversations(family: Family, count: int, seed: int = 0) -> Iterator[tuple[list[dict], list[dict] | None]]:
    rng = random.Random(f"{family.name} {seed}")
    return (conversation(rng, family) for _ in range(count))


@st.composite
def hostile_conversations(draw: st.DrawFn, family: Family) -> tuple[list[dict], list[dict] | None]:
    """The same conversations with any text among the words, for hypothesis."""
    words = draw(st.lists(st.text(min_size=1, max_size=12), max_size=6))
    rng = draw(st.randoms(use_true_random=False))
    return conversation(rng, family, WORDS + tuple(words) * 8)
