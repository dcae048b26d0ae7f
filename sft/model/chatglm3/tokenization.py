"""ChatGLM3's tokenizer: fast, built from the checkpoint's own `tokenizer.model`, conversations segment by segment.

A conversation is `[gMASK] sop`, then for each message `<|role|>`, encode(metadata + "\\n") and encode(content), each
encoded by itself with its own dummy prefix. Control tokens therefore enter by id, and nothing in a text can spell one:
text is encoded with `split_special_tokens`. `encode_conversation`, `encode_prompt` and `stop_token_ids` are exact.

`chat_template` is the same over one string, for `apply_chat_template` and servers. Its ids are those of the segments
unless a message spells a control token ("<|user|>", "</s>", or "sop" and "eop" as whole words): in one string that is
the token. Arguments of a tool call must be an object there, not JSON text.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple, cast

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import TokenizersBackend

from sft.errors import FormatError, ModelError
from sft.model.chatglm3.spm import CONTROL, UNKNOWN, bpe_backend, read_pieces

# Their ids follow the pieces' in this order: 64789 to 64797 in the released model.
SPECIAL_TOKENS = (
    "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"
)  # fmt: skip
PREFIX = ["[gMASK]", "sop"]
ROLES = ("system", "user", "assistant", "observation")

# What the vendor's demos and fine-tuning code put before a list of tools.
TOOLS_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"

CHAT_TEMPLATE = r"""
{%- macro segment(role, metadata, content) -%}
<|{{ role }}|>{{ metadata }}{{ "\n" }}{% if content %} {{ content }}{% endif %}
{%- endmacro -%}
{%- macro listing(tools) -%}
{%- set ns = namespace(functions=[]) -%}
{%- for tool in tools -%}{%- set ns.functions = ns.functions + [tool.get("function", tool)] -%}{%- endfor -%}
{{ "\n" }}{{ ns.functions | tojson(indent=4) }}
{%- endmacro -%}
[gMASK]sop
{%- if tools and messages[0].role != "system" -%}
{{ segment("system", "", "TOOLS_PROMPT" + listing(tools)) }}
{%- endif -%}
{%- for message in messages -%}
{%- set content = message.content or "" -%}
{%- if message.role == "system" -%}
{%- set shown = message.tools or (tools if loop.first) -%}
{{ segment("system", "", content + (listing(shown) if shown else "")) }}
{%- elif message.role == "assistant" -%}
{%- if content or not message.tool_calls -%}{{ segment("assistant", message.metadata or "", content) }}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function or call -%}
{%- set ns = namespace(arguments=[]) -%}
{%- for name, value in function.arguments.items() -%}
{%- set ns.arguments = ns.arguments + [name + "=" + "%r" | format(value)] -%}
{%- endfor -%}
{{ segment("assistant", function.name, "```python\ntool_call(" + ns.arguments | join(", ") + ")\n```") }}
{%- endfor -%}
{%- elif message.role in ("user", "observation", "tool") -%}
{{ segment("observation" if message.role == "tool" else message.role, message.metadata or "", content) }}
{%- else -%}
{{ raise_exception("ChatGLM3 has no role " + message.role) }}
{%- endif -%}
{%- endfor -%}
{{ "<|assistant|>" if add_generation_prompt else eos_token }}""".lstrip().replace("TOOLS_PROMPT", TOOLS_PROMPT)


class Segment(NamedTuple):
    role: str
    metadata: str
    content: str


class ChatGLMTokenizer(TokenizersBackend):
    """Loads from `tokenizer.json` where there is one (what `save_pretrained` writes), else from `tokenizer.model`.

    Raises: ModelError: neither file is there, or `tokenizer.model` is of another kind.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}
    padding_side = "left"

    def __init__(self, vocab_file: str | None = None, tokenizer_file: str | None = None, **kwargs: Any) -> None:
        if tokenizer_file is None:
            if vocab_file is None:
                raise ModelError("ChatGLM3's tokenizer needs tokenizer.model or tokenizer.json; neither is there")
            self._tokenizer: Any = build_backend(vocab_file)  # the base class declares None
            kwargs["chat_template"] = CHAT_TEMPLATE  # some releases bring one that renders tools and metadata wrongly
        # Some releases list the control tokens in tokenizer_config.json, as ordinary ones that text would match.
        for name in ("added_tokens_decoder", "extra_special_tokens", "add_bos_token", "add_eos_token"):
            kwargs.pop(name, None)
        defaults = {"unk_token": "<unk>", "pad_token": "<unk>", "eos_token": "</s>", "split_special_tokens": True}
        super().__init__(vocab_file=vocab_file, tokenizer_file=tokenizer_file, **(defaults | kwargs))

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        return kwargs  # __init__ reads both kinds of file itself

    @property
    def stop_token_ids(self) -> list[int]:
        """A generated turn ends with one of these: </s>, <|user|>, <|observation|>."""
        return self._ids("</s>", "<|user|>", "<|observation|>")

    def encode_conversation(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a whole conversation, and for each assistant message the range of them that is trained.

        messages: {"role", "content"}; role "tool" means "observation". An assistant message may bring "metadata" (the
        name of what it calls) or "tool_calls"; a call becomes a segment of its own, as in the vendor's data.
        tools: shown in the system message, in the vendor's words if there is none.

        Returns: input_ids, and [start, stop) ranges: from after `<|assistant|>` to the token after the turn, included:
            the next role's, or </s>, which ends every conversation.
        Raises: FormatError: a role, content, metadata or tool call that ChatGLM3's format cannot hold.
        """
        input_ids = self._ids(*PREFIX)
        turns = []
        for message in _show_tools(messages, tools):
            start = len(input_ids) + 1
            input_ids += self._encode_message(message)
            if message["role"] == "assistant":
                turns.append((start, len(input_ids) + 1))
        return input_ids + self._ids("</s>"), turns

    def encode_prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Token ids after which the model writes the next assistant turn; they end with a bare `<|assistant|>`.

        Arguments and errors as in `encode_conversation`.
        """
        input_ids = self._ids(*PREFIX)
        for message in _show_tools(messages, tools):
            input_ids += self._encode_message(message)
        return input_ids + self._ids("<|assistant|>")

    def _ids(self, *tokens: str) -> list[int]:
        return cast(list[int], self.convert_tokens_to_ids(list(tokens)))

    def _encode_message(self, message: dict[str, Any]) -> list[int]:
        segments = _to_segments(message)
        texts = [text for segment in segments for text in (segment.metadata + "\n", segment.content)]
        encoded = iter(self(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        input_ids: list[int] = []
        for segment in segments:
            input_ids += self._ids(f"<|{segment.role}|>") + next(encoded) + next(encoded)
        return input_ids

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; here, and only here, control tokens are read from the rendered text."""
        kwargs["tokenizer_kwargs"] = {"split_special_tokens": False, **(kwargs.get("tokenizer_kwargs") or {})}
        return super().apply_chat_template(*args, **kwargs)


def build_backend(path: str | Path) -> Tokenizer:
    """The `tokenizers` backend of a `tokenizer.model`; a single text is encoded as `[gMASK] sop $A`.

    Raises: ModelError: `tokenizer.model` is of another kind.
    """
    pieces = read_pieces(path)
    if clash := {piece.text for piece in pieces} & set(SPECIAL_TOKENS):
        raise ModelError(f"{path}: not a ChatGLM3 tokenizer.model, which has no pieces {', '.join(sorted(clash))}")
    backend = bpe_backend(pieces)
    control = [piece.text for piece in pieces if piece.type in (UNKNOWN, CONTROL)]
    if not {"<unk>", "</s>"} <= set(control):
        raise ModelError(f"{path}: not a ChatGLM3 tokenizer.model, which has the control pieces <unk> and </s>")
    # single_word: where control tokens are read from a rendered conversation, "philosophers" still holds no "sop".
    backend.add_special_tokens(
        [AddedToken(token, single_word=token.isalpha(), normalized=False) for token in (*control, *SPECIAL_TOKENS)]
    )
    backend.post_processor = TemplateProcessing(
        single=[*PREFIX, "$A"],
        pair=[*PREFIX, "$A", "$B", "</s>"],
        special_tokens=[(token, backend.token_to_id(token)) for token in (*PREFIX, "</s>")],
    )
    return backend


def _show_tools(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The messages with `tools` as "tools" of the first, which is a system message then."""
    if not tools:
        return messages
    if not messages or messages[0].get("role") != "system":
        messages = [{"role": "system", "content": TOOLS_PROMPT}, *messages]
    return [messages[0] | {"tools": messages[0].get("tools") or tools}, *messages[1:]]


def _to_segments(message: dict[str, Any]) -> list[Segment]:
    """One segment; an assistant message with tool calls has its content (if any) and each call in one of its own."""
    role = {"tool": "observation"}.get(message.get("role", ""), message.get("role"))
    content, metadata = message.get("content") or "", message.get("metadata") or ""
    if role not in ROLES:
        raise FormatError(f"role {role!r}; ChatGLM3 has {', '.join(ROLES)} (or tool)")
    if not isinstance(content, str) or not isinstance(metadata, str):
        raise FormatError(
            f"content and metadata of ChatGLM3 are text; the {role} message has {content!r}, {metadata!r}"
        )
    if role == "system" and message.get("tools"):
        functions = [tool.get("function", tool) for tool in message["tools"]]
        content += "\n" + json.dumps(functions, indent=4, ensure_ascii=False)
    calls = message.get("tool_calls") or []
    if calls and role != "assistant":
        raise FormatError(f"tool_calls in a {role} message")
    segments = [Segment(role, metadata, content)] if content or not calls else []
    return segments + [_call_to_segment(call) for call in calls]


def _call_to_segment(call: dict[str, Any]) -> Segment:
    """A call as the vendor's fine-tuning code writes it: the name as metadata, the arguments as Python keywords."""
    function = call.get("function", call)
    try:
        name, arguments = function["name"], function.get("arguments") or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        keywords = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    except (AttributeError, KeyError, ValueError) as error:
        raise FormatError(f"tool call {call!r} is not {{name, arguments (an object)}}: {error!r}") from None
    return Segment("assistant", name, f"```python\ntool_call({keywords})\n```")
