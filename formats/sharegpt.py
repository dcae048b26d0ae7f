"""Rows {"conversations": [{"from", "value"}, ...], "system" (optional), "tools" (optional)}: as ShareGPT wrote them.

The names of the speakers are those of FastChat, Axolotl, LLaMA-Factory and ms-swift (`ROLES`). The value of a
function_call is JSON, `{"name", "arguments"}` or a list of these. `tools` is a list of JSON schemas, or its text.

>>> to_messages({"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]})
[{'role': 'user', 'content': 'Hi.'}, {'role': 'assistant', 'content': 'Hello.'}]
>>> call = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'}
>>> to_messages({"conversations": [call]})[0]["tool_calls"]
[{'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 2}}}]
"""

import json
from typing import Any

from sft.errors import FormatError

FIELDS = {
    "required": {"conversations": list},
    "optional": {"system": str, "tools": (list, str)},
    "turns": {"from": str, "value": str},
}
ROLES = {
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant", "chatgpt", "bing", "bard", "bot", "model"),
    "system": ("system",),
    "tool": ("tool", "observation", "function_response", "tool_response", "function"),
    "call": ("function_call", "tool_call"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}


def to_messages(row: dict[str, Any], system: str | None = None) -> list[dict[str, Any]]:
    """Gives the row's messages; `system` is the system prompt of a row that brings none.

    Raises: FormatError: a turn has no known speaker or no text, or there is no answer.
    """
    messages = [_message(number, turn) for number, turn in enumerate(row["conversations"], start=1)]
    if not any(message["role"] == "assistant" for message in messages):
        raise FormatError("there is no answer in conversations")
    prompt = row.get("system") or system
    if prompt and messages[0]["role"] != "system":
        return [{"role": "system", "content": prompt}, *messages]
    return messages


def _message(number: int, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise FormatError(f'turn {number} is {type(turn).__name__}, not {{"from", "value"}}')
    name, text = turn.get("from"), turn.get("value")
    role = ROLE_OF.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        known = "human, gpt, system, function_call, observation and their other spellings"
        raise FormatError(f"the speaker (from) of turn {number} is {name!r}; known are {known}")
    if not isinstance(text, str):
        found = f"is {type(text).__name__}, not text" if "value" in turn else "is missing"
        raise FormatError(f"the value of turn {number} ({name}) {found}")
    if role in ("user", "assistant", "call") and not text.strip():
        raise FormatError(f"the value of turn {number} ({name}) is empty")
    marks = {key: turn[key] for key in ("train", "loss", "weight") if key in turn}
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _tool_calls(number, text), **marks}
    return {"role": role, "content": text, **marks}


def _tool_calls(number: int, text: str) -> list[dict[str, Any]]:
    try:
        calls = json.loads(text)
    except ValueError as error:
        raise FormatError(f"the function_call of turn {number} is not JSON: {error}") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise FormatError(f'the function_call of turn {number} is not {{"name", "arguments"}}')
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]
