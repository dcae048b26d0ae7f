"""Rows {"system" (optional), "conversation": [{"human", "assistant"}, ...]}: a dialogue in turns.

>>> to_messages({"conversation": [{"human": "Hi.", "assistant": "Hello."}]})
[{'role': 'user', 'content': 'Hi.'}, {'role': 'assistant', 'content': 'Hello.'}]
"""

from typing import Any

from sft.errors import FormatError

FIELDS = {"required": {"conversation": list}, "optional": {"system": str}, "turns": {"human": str, "assistant": str}}


def to_messages(row: dict[str, Any], system: str | None = None) -> list[dict[str, Any]]:
    """Gives the row's messages; `system` is the system prompt of a row that brings none.

    Raises: FormatError: there is no turn, or a turn lacks its question or its answer.
    """
    prompt = row.get("system") or system
    messages = [{"role": "system", "content": prompt}] if prompt else []
    if not row["conversation"]:
        raise FormatError("the conversation is empty")
    for number, turn in enumerate(row["conversation"], start=1):
        if not isinstance(turn, dict):
            raise FormatError(f'turn {number} is {type(turn).__name__}, not {{"human", "assistant"}}')
        for key, role, name in (("human", "user", "question"), ("assistant", "assistant", "answer")):
            text = turn.get(key)
            if not isinstance(text, str):
                found = (
                    f"is {type(text).__name__}, not text"
                    if key in turn
                    else f"is missing; the turn has {', '.join(turn)[:60]}"
                )
                raise FormatError(f"the {name} of turn {number} ({key}) {found}")
            if not text.strip():
                raise FormatError(f"the {name} of turn {number} is empty")
            messages.append({"role": role, "content": text})
    return messages
