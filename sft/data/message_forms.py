"""The forms that a chat template wants messages in, found by rendering a probe in each form.

Content is text in our messages; some templates take it only as parts, `[{"type": "text", "text": ...}]`. The arguments
of a tool call are JSON text at OpenAI, which some templates write as it stands (DeepSeek-V3), some encode once more
(Qwen2.5) and some refuse (Qwen3.5): those two want an object. Its content is null there, which some refuse.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

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


class CallForm(NamedTuple):
    """What a template wants of a message that calls tools.

    arguments: dict, str (JSON text), or None: either, as it comes. content: it must have some, if only "".
    """

    arguments: type | None = None
    content: bool = False


def call_form(render: Callable[[list[Message]], str]) -> CallForm:
    """Found by rendering the same call in each form."""

    def written(arguments: Any, **content: str) -> str | None:
        call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
        messages: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [call], **content},
            {"role": "tool", "name": "f", "tool_call_id": "call00001", "content": "b"},
        ]
        try:
            text = render(messages)
        except FormatError:
            return None
        return text if "value" in text else None

    as_object, as_text = {"key": "value"}, '{"key": "value"}'
    from_object, from_text = written(as_object, content=""), written(as_text, content="")
    form: type | None = None
    if from_object != from_text:
        in_python = from_object is None or from_text is not None and "{'key': 'value'}" in from_object
        form = str if in_python else dict
    known = as_text if form is str else as_object
    return CallForm(form, written(known) is None and written(known, content="") is not None)


def fit_calls(messages: list[Message], form: CallForm) -> list[Message]:
    """The messages with their tool calls in this form.

    Raises: FormatError: arguments that must become an object are not the JSON text of one.
    """
    if form == CallForm() or not any(message.get("tool_calls") for message in messages):
        return messages
    fitted = []
    for number, message in enumerate(messages, start=1):
        if isinstance(calls := message.get("tool_calls"), list):
            message = {**message, "tool_calls": [_fit_call(call, form.arguments, number) for call in calls]}
            if form.content:
                message["content"] = message.get("content") or ""
        fitted.append(message)
    return fitted


def _fit_call(call: Any, form: type | None, number: int) -> Any:
    function = call.get("function") or call if isinstance(call, dict) else {}
    arguments = function.get("arguments")
    if form is str and isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif form is dict and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise FormatError(f"the arguments of a tool call of message {number} are not JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise FormatError(f"the arguments of a tool call of message {number} are not a JSON object")
    else:
        return call
    changed = {**function, "arguments": arguments}
    return {**call, "function": changed} if function is not call else changed
