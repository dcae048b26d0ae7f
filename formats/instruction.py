"""Rows {"instruction", "input" (optional), "output", "system" (optional)}: one question, one answer.

>>> to_messages({"instruction": "Add.", "input": "2 + 2", "output": "4"})
[{'role': 'user', 'content': 'Add.\\n2 + 2'}, {'role': 'assistant', 'content': '4'}]
>>> to_messages({"instruction": "Hi.", "output": "Hello."}, system="Be brief.")[0]
{'role': 'system', 'content': 'Be brief.'}
"""

from typing import Any

from sft.errors import FormatError

FIELDS = {"required": {"instruction": str, "output": str}, "optional": {"input": str, "system": str}}


def to_messages(row: dict[str, Any], system: str | None = None) -> list[dict[str, Any]]:
    """Gives the row's messages; `system` is the system prompt of a row that brings none.

    Raises: FormatError: the question or the answer is empty.
    """
    question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    if not question.strip():
        raise FormatError("the instruction is empty")
    if not row["output"].strip():
        raise FormatError("the answer (output) is empty")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    prompt = row.get("system") or system
    return [{"role": "system", "content": prompt}, *messages] if prompt else messages
