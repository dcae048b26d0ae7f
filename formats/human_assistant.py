"""Rows {"human", "assistant", "system" (optional)}: one turn of `conversation` by itself, as a table can hold it.

>>> to_messages({"human": "Hi.", "assistant": "Hello."})
[{'role': 'user', 'content': 'Hi.'}, {'role': 'assistant', 'content': 'Hello.'}]
"""

from typing import Any

from sft.errors import FormatError

FIELDS = {"required": {"human": str, "assistant": str}, "optional": {"system": str}}


def to_messages(row: dict[str, Any], system: str | None = None) -> list[dict[str, Any]]:
    """Gives the row's messages; `system` is the system prompt of a row that brings none.

    Raises: FormatError: the question or the answer is empty.
    """
    for key, name in (("human", "question"), ("assistant", "answer")):
        if not row[key].strip():
            raise FormatError(f"the {name} ({key}) is empty")
    prompt = row.get("system") or system
    messages = [{"role": "system", "content": prompt}] if prompt else []
    return [*messages, {"role": "user", "content": row["human"]}, {"role": "assistant", "content": row["assistant"]}]
