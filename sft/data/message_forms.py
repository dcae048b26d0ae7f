"""The forms that a chat template wants messages in, found by rendering a probe in each form.

Content is text in our messages; some templates take it only as parts, `[{"type": "text", "text": ...}]`.
"""

from collections.abc import Callable
from typing import Any

from sft.data.control_tokens import PRIVATE_USE
from sft.data.conversation import Message
from sft.errors import FormatError

MARK = PRIVATE_USE[0]


def wants_parts(render: Callable[[list[Message]], str]) -> bool:
    """Whether a template writes content that comes in parts, and not the same content as text."""

    def writes(content: Any) -> bool:
        try:
            text = render([{"role": "user", "content": content}, {"role": "assistant", "content": content}])
        except FormatError:
            return False
        return text.count(MARK) == 2

    return not writes(MARK) and writes([{"type": "text", "text": MARK}])


def in_parts(message: Message) -> Message:
    """The message with its content as one part."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
