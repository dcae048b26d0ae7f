"""Rows {"prompt", "completion", "system" (optional), "tools" (optional)}: as trl takes them, each a text or messages.

A text is one message: the prompt of the user, the completion of the assistant. Messages are {"role", "content", ...}.
`tools` is a list of JSON schemas, or its text. Answers in the prompt are not trained on.

>>> to_messages({"prompt": "Hi.", "completion": "Hello."})
[{'role': 'user', 'content': 'Hi.'}, {'role': 'assistant', 'content': 'Hello.'}]
>>> to_messages({"prompt": [{"role": "user", "content": "Hi."}], "completion": "Hello."})
[{'role': 'user', 'content': 'Hi.'}, {'role': 'assistant', 'content': 'Hello.'}]
"""

from typing import Any

from sft.errors import FormatError

FIELDS = {
    "required": {"prompt": (str, list), "completion": (str, list)},
    "optional": {"system": str, "tools": (list, str)},
}
ROLES = ("system", "developer", "user", "assistant", "tool")


def to_messages(row: dict[str, Any], system: str | None = None) -> list[dict[str, Any]]:
    """Gives the row's messages; `system` is the system prompt of a row that brings none.

    Raises: FormatError: a message has no known role or no content, or the completion holds no answer.
    """
    before, answers = _messages(row, "prompt", "user"), _messages(row, "completion", "assistant")
    if not any(message["role"] == "assistant" for message in answers):
        raise FormatError("there is no assistant message in completion")
    context = [{"train": False, **message} if message["role"] == "assistant" else message for message in before]
    messages = [*context, *answers]
    prompt = row.get("system") or system
    if prompt and messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": prompt}, *messages]
    return messages


def _messages(row: dict[str, Any], key: str, role_of_text: str) -> list[dict[str, Any]]:
    value = row[key]
    messages = [{"role": role_of_text, "content": value}] if isinstance(value, str) else value
    for number, message in enumerate(messages, start=1):
        place = key if isinstance(value, str) else f"message {number} of {key}"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise FormatError(f'{place} is not {{"role", "content"}} with a role of {", ".join(ROLES)}')
        content, calls = message.get("content"), message.get("tool_calls")
        if not isinstance(content, str) and not (content is None and calls):
            raise FormatError(f"the content of {place} is {type(content).__name__}, not text")
        if message["role"] in ("user", "assistant") and not calls and not (content or "").strip():
            raise FormatError(f"{place} is empty")
    return messages
