"""What a chat template shows of itself in short dialogues, before any row is read."""

import re
from typing import NamedTuple

from sft.data.answer_spans import Render, locate_turns
from sft.data.control_tokens import PRIVATE_USE
from sft.data.conversation import Message, assistant_turns
from sft.errors import FormatError


class Probed(NamedTuple):
    """What a plain dialogue and a tool call tell of a template.

    tokens: the added tokens that it writes outside the answers or ends them with: its control tokens.
    closings: `LocatedTurns.closing` of a conversation, by whether its last message calls tools.
    opener: what an answer writes before its content, if control tokens are part of that (gpt-oss: the final channel).
    """

    tokens: set[str]
    closings: dict[bool, str]
    opener: str


def probe_template(render: Render, added_tokens: re.Pattern[str]) -> Probed:
    """added_tokens: finds what may prove to be a control token."""
    content = PRIVATE_USE[-1]
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": content}
    call: Message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00001", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    probes: list[list[Message]] = [
        [user, assistant, user, assistant],
        [{"role": "system", "content": "c"}, user, assistant, user, assistant],
        [user, call, {"role": "tool", "name": "f", "tool_call_id": "call00001", "content": "d"}, assistant],
        [user, call],
        [user, assistant],
    ]
    tokens: set[str] = set()
    closings, opener = {}, ""
    for messages in probes:
        try:
            text, spans, _, closing = locate_turns(render, messages, None, added_tokens, assistant_turns(messages))
        except FormatError:
            continue  # a template without tools, or without system prompts
        closings["tool_calls" in messages[-1]] = closing
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            tokens.update(added_tokens.findall(text, start, stop))
        for start, stop in spans:
            tokens.update(added_tokens.findall(text, start, stop)[-1:])
            before, _, written = text[start:stop].partition(content)
            opener = before if written and added_tokens.search(before) else ""
    return Probed(tokens, closings, opener)
