"""Rows {"instruction", "input" (optional), "output", "history" (optional), "system" (optional)}: as Alpaca's.

`history` holds the turns before, each [instruction, output].

>>> to_messages({"instruction": "Add.", "input": "2 + 2", "output": "4"})
[{'role': 'user', 'content': 'Add.\\n2 + 2'}, {'role': 'assistant', 'content': '4'}]
>>> to_messages({"instruction": "Hi.", "output": "Hello."}, system="Be brief.")[0]
{'role': 'system', 'content': 'Be brief.'}
>>> to_messages({"instruction": "And 3?", "output": "6", "history": [["Twice 2?", "4"]]})[:2]
[{'role': 'user', 'content': 'Twice 2?'}, {'role': 'assistant', 'content': '4'}]
"""

from typing import Any

from sft.errors import FormatError

FIELDS = {"required": {"instruction": str, "output": str}, "optional": {"input": str, "history": list, "system": str}}


def to_messages(row: dict[str, Any], system: str | None = None) -> list[dict[str, Any]]:
    """Gives the row's messages; `system` is the system prompt of a row that brings none.

    Raises: FormatError: a question or an answer is empty, or the history is not of pairs.
    """
    question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    if not question.strip():
        raise FormatError("the instruction is empty")
    if not row["output"].strip():
        raise FormatError("the answer (output) is empty")
    turns = row.get("history") or []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise FormatError(f"turn {number} of the history is not [instruction, output]")
        if not all(text.strip() for text in turn):
            raise FormatError(f"turn {number} of the history has an empty instruction or output")
    prompt = row.get("system") or system
    messages = [{"role": "system", "content": prompt}] if prompt else []
    for asked, answered in [*turns, (question, row["output"])]:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages
