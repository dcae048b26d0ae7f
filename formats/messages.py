"""Rows {"messages": [{"role", "content", ...}, ...], "tools" (optional)}: as chat templates and servers take them.

An assistant message may bring `tool_calls` instead of content, and the tools' answers have the role "tool". `tools` is
a list of JSON schemas, or its text. An answer with `train`, `loss` or `weight` false (0) is mere context. Other keys of
a message (`reasoning_content`, ...) go to the template as they are.
Content in parts, `[{"type": "text", "text": ...}, ...]`, becomes the text of its parts, one after the other.

>>> to_messages({"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]})
[{'role': 'user', 'content': 'Hi.'}, {'role': 'assistant', 'content': 'Hello.'}]
"""

from typing import Any

from sft.errors import FormatError

FIELDS = {
    "required": {"messages": list},
    "optional": {"tools": (list, str), "system": str},
    "turns": {"role": str, "content": str},
}
ROLES = ("system", "developer", "user", "assistant", "tool", "observation")


def to_messages(row: dict[str, Any], system: str | None = None) -> list[dict[str, Any]]:
    """Gives the row's messages; `system` is the system prompt of a row that brings none.

    Raises: FormatError: a message has no known role or no content, or there is no assistant message.
    """
    messages = []
    for number, message in enumerate(row["messages"], start=1):
        if not isinstance(message, dict):
            raise FormatError(f'message {number} is {type(message).__name__}, not {{"role", "content"}}')
        if isinstance(message.get("content"), list):
            message = {**message, "content": _joined(message["content"], number)}
        messages.append(message)
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise FormatError(f"the role of message {number} is {role!r}; known are {', '.join(ROLES)}")
        calls = message.get("tool_calls")
        if calls is not None and not (role == "assistant" and isinstance(calls, list)):
            raise FormatError(f"tool_calls of message {number} must be a list, in an assistant message")
        if not isinstance(content, str) and not (content is None and calls):
            raise FormatError(f"the content of message {number} is {type(content).__name__}, not text")
        if role == "assistant" and not calls and not (content or "").strip():
            raise FormatError(f"the answer in message {number} is empty")
    if not any(message["role"] == "assistant" for message in messages):
        raise FormatError("there is no assistant message")
    prompt = row.get("system") or system
    if prompt and messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": prompt}, *messages]
    return messages


def _joined(parts: list[Any], number: int) -> str:
    """The text of content in parts. Raises: FormatError: a part is not text."""
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise FormatError(
                f"the content of message {number} has a part of type {kind!r}; only parts "
                '{"type": "text", "text": ...} can be trained on'
            )
    return "".join(part["text"] for part in parts)
