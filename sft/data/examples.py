"""Which examples a row gives, as chat.examples says: the whole conversation, or one for each answer.

An example of `each_answer` is the conversation up to an answer, written as a server shows it when that answer is due;
only this answer carries loss in it. `auto` does so for the rows in which a template writes history otherwise: Qwen3
with its `<think>` blocks. For all other rows one example, the whole, teaches the same.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sft.data.chat import ChatEncoder
from sft.data.conversation import Conversation, assistant_turns
from sft.data.turn_reader import FIELDS, Shape
from sft.errors import FormatError
from sft.recipe import ChatOptions

REWRITTEN = "rows with an answer that the template writes otherwise, or after another history, once more follows"


class Examples(NamedTuple):
    """What is trained of one row. One for each row of a batch, so it holds as little as it can.

    shape: of the conversation. answers: the messages that have an example of their own; none: the whole is the example.
    is_rewritten: whether the template writes history otherwise (`REWRITTEN`).
    """

    conversation: Conversation
    shape: Shape | None
    answers: Sequence[int]
    is_rewritten: bool

    @property
    def conversations(self) -> list[Conversation]:
        """Each an example, whose last answer alone carries loss where `answers` are given."""
        whole = self.conversation
        return [whole._replace(messages=whole.messages[: k + 1]) for k in self.answers] or [whole]


class ExampleMaker:
    """Makes the examples of rows."""

    def __init__(self, encoder: ChatEncoder, options: ChatOptions):
        self._encoder, self._mode = encoder, options.examples
        self._last_only = options.loss_on == "last_turn"

    def make(self, conversation: Conversation) -> Examples:
        messages, shape = conversation.messages, self._encoder.shape(conversation)
        if shape is not None and shape.count("assistant") == 1 and messages[-1]["role"] == "assistant":
            return Examples(conversation, shape, (), False)  # nothing follows its one answer, as in most rows
        answers = assistant_turns(messages)
        if not answers or answers == [len(messages) - 1]:
            return Examples(conversation, shape, (), False)
        rewritten = self._encoder.rewrites_history(conversation, shape)
        if self._mode == "whole" or (self._mode == "auto" and not rewritten):
            return Examples(conversation, shape, (), rewritten)
        answers = answers[-1:] if self._last_only else answers
        answers = [k for k in answers if k not in conversation.untrained]
        if not answers:
            raise FormatError("there is no assistant turn to train on")
        return Examples(conversation, shape, answers, rewritten)

    def flat(self, rows: Iterable[Examples]) -> tuple[list[Conversation], list[Shape | None], set[int]]:
        """What `ChatEncoder.render_batch` takes: the examples of all rows, their shapes, and which train one answer."""
        conversations: list[Conversation] = []
        shapes: list[Shape | None] = []
        last_only: set[int] = set()
        for examples in rows:
            conversation, shape, answers, _ = examples
            if not answers:
                conversations.append(conversation)
                shapes.append(shape)
                continue
            beginnings = examples.conversations
            last_only.update(range(len(conversations), len(conversations) + len(beginnings)))
            conversations += beginnings
            if shape is None:  # that of a beginning may be known
                shapes += map(self._encoder.shape, beginnings)
            else:
                shapes += [shape[: 1 + FIELDS * (k + 1)] for k in answers]
        return conversations, shapes, last_only
