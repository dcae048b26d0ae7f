"""Rows {"query", "response", "history" (optional), "system" (optional), "tools" (optional)}: as ms-swift takes them.

`history` holds the turns before, each [query, response]. `tools` is a list of JSON schemas, or its text.

>>> to_messages({"query": "And 3?", "response": "6", "history": [["Twice 2?", "4"]]})[:2]
[{'role': 'user', 'content': 'Twice 2?'}, {'role': 'assistant', 'content': '4'}]
"""

from typing import Any

from sft.errors import FormatError

FIELDS = {
    "required": {"query": str, "response": str},
    "optional": {"history": list, "system": str, "tools": (list, str)},
}


def to_messages(row: dict[str, Any], system: str | None = None) -> list[dict[str, Any]]:
    """Gives the row's messages; `system` is the system prompt of a row that brings none.

    Raises: FormatError: a question or an answer is empty, or the history is not of pairs.
    """
    if not row["query"].strip():
        raise FormatError("the query is empty")
    if not row["response"].strip():
        raise FormatError("the answer (response) is empty")
    turns = row.get("history") or []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise FormatError(f"turn {number} of the history is not [query, response]")
        if not all(text.strip() for text in turn):
            raise FormatError(f"turn {number} of the history has an empty query or response")
    prompt = row.get("system") or system
    messages = [{"role": "system", "content": prompt}] if prompt else []
    for asked, answered in [*turns, (row["query"], row["response"])]:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages
