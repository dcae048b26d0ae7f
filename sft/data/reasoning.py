"""Where the reasoning of an answer ends, for chat.loss_on: after_thinking, and whether a template writes it at all.

<think>⏎He asks for a greeting.⏎</think>⏎⏎Aye.<|im_end|>
                                          ^ loss begins here: after the end of the block and its line breaks
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

from transformers import PreTrainedTokenizerBase

from sft.data.answer_spans import Render
from sft.data.control_tokens import PRIVATE_USE, added_token_pattern, unused_character
from sft.data.conversation import Conversation, Message, assistant_turns
from sft.data.turn_reader import Turn
from sft.errors import FormatError

FIELDS = ("reasoning_content", "reasoning", "thinking")  # the names that transformers knows  pinned: transformers
OPEN, CLOSE = "<think>", "</think>"
NOT_WRITTEN = "rows with reasoning that the chat template writes in no answer: it is not trained; see chat.template"


def forms_not_written(render: Render) -> set[str]:
    """In which forms reasoning is left out of even the last answer: of FIELDS, and CLOSE for a block in the content.

    DeepSeek-R1's distillations have such a template, and no model without reasoning reads the fields.
    """
    mark, user = PRIVATE_USE[-1], {"role": "user", "content": "a"}
    answers: dict[str, Message] = {field: {"role": "assistant", "content": "b", field: mark} for field in FIELDS}
    answers[CLOSE] = {"role": "assistant", "content": f"{OPEN}\n{mark}\n{CLOSE}\n\nb"}
    left_out = set()
    for form, answer in answers.items():
        with suppress(FormatError):  # it takes no such dialogue; a row of its kind says so
            if mark not in render([user, answer], None):
                left_out.add(form)
    return left_out


def leaves_out(left_out: set[str], conversation: Conversation) -> bool:
    """Whether reasoning of an answer that carries loss is in no form that the template writes."""
    for k in set(assistant_turns(conversation.messages)) - conversation.untrained:
        message = conversation.messages[k]
        forms = {field for field in FIELDS if message.get(field)}
        forms |= {CLOSE} if CLOSE in (message.get("content") or "") else set()
        if forms and forms <= left_out:
            return True
    return False


class Reasoning:
    """Finds the end of reasoning in the answers of one template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, render: Render):
        self._render = render
        self._closing = re.compile(f"{added_token_pattern(tokenizer).pattern}|{re.escape(CLOSE)}")
        added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}
        self._open_id, self._close_id = added.get(OPEN), added.get(CLOSE)

        @cache
        def is_line_break(token: int) -> bool:
            text = str(tokenizer.decode([token]))
            return bool(text) and not text.strip("\n")

        self._is_line_break = is_line_break

    def may_read(self, conversation: Conversation, text: str) -> bool:
        """Whether `after_block` says of a rendered conversation's ids what `end` says of its text."""
        as_tokens = self._open_id is not None and self._close_id is not None
        return (as_tokens or CLOSE not in text) and not any(map(_brings_reasoning, conversation.messages))

    def end(self, conversation: Conversation, k: int, text: str, span: tuple[int, int]) -> int:
        """Where the loss of message k begins in `text`: behind its reasoning, or where its span begins if it has none.

        Reasoning in a field of its own is found by rendering it as a mark: it ends with the next added token
        (`</think>`, gpt-oss' `<|end|>`). Any other is a block whose `<think>` begins the answer, or ends its header.
        """
        (messages, tools, _), (start, stop) = conversation, span
        end = None
        if _brings_reasoning(messages[k]):
            mark = unused_character((text, messages, tools))
            marked = {key: mark if key in FIELDS and value else value for key, value in messages[k].items()}
            marked_text = self._render([*messages[:k], marked, *messages[k + 1 :]], tools)
            tail = marked_text[marked_text.find(mark) + 1 :]
            if marked_text.count(mark) == 1 and text.endswith(tail) and start <= len(text) - len(tail) < stop:
                end = len(text) - len(tail)
                closed_by = self._closing.search(text, end, stop)
                end = closed_by.end() if closed_by and closed_by.end() < stop else end
        if end is None and (text.startswith(OPEN, start) or text[:start].rstrip("\n").endswith(OPEN)):
            closed_at = text.find(CLOSE, start, stop)
            end = closed_at + len(CLOSE) if closed_at >= 0 else None
        while end is not None and text.startswith("\n", end):
            end += 1
        return start if end is None else end

    def after_block(self, ids: Sequence[int], turn: Turn) -> Turn:
        """The turn without the block that it begins with, read off the ids."""
        start, stop = turn
        before = start - 1
        while before >= 0 and self._is_line_break(ids[before]):
            before -= 1
        if ids[start] != self._open_id and (before < 0 or ids[before] != self._open_id):
            return turn
        end = next((i + 1 for i in range(start, stop) if ids[i] == self._close_id), None)
        while end is not None and self._is_line_break(ids[end]):
            end += 1
        return start if end is None else end, stop


def _brings_reasoning(message: Message) -> bool:
    return any(message.get(field) for field in FIELDS)
