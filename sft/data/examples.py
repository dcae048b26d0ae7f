"""Which examples a row gives, as chat.examples says: the whole conversation, or one for each answer.

An example of `each_answer` is the conversation up to an answer, written as a server shows it when that answer is due;
only this answer carries loss in it. `auto` does so for the rows in which a template writes history otherwise: Qwen3
with its `<think>` blocks. For all other rows one example, the whole, teaches the same.
"""

from typing import NamedTuple

from sft.data.chat import ChatEncoder
from sft.data.conversation import Conversation, assistant_turns
from sft.data.turn_reader import FIELDS, Shape
from sft.errors import FormatError
from sft.recipe import ChatOptions

REWRITTEN = "rows with an answer that the template writes otherwise, or after another history, once more follows"


class Examples(NamedTuple):
    """What is trained of one row.

    conversations: each an example. shapes: theirs. is_whole: whether all answers of an example carry loss, or its last.
    is_rewritten: whether the template writes history otherwise (`REWRITTEN`).
    """

    conversations: list[Conversation]
    shapes: list[Shape | None]
    is_whole: bool
    is_rewritten: bool


class ExampleMaker:
    """Makes the examples of rows. Where roles decide, whether history is rewritten is asked once for each shape."""

    def __init__(self, encoder: ChatEncoder, options: ChatOptions):
        self._encoder, self._mode = encoder, options.examples
        self._last_only = options.loss_on == "last_turn"
        self._rewritten: dict[Shape, bool] = {}

    def make(self, conversation: Conversation) -> Examples:
        messages, shape = conversation.messages, self._encoder.shape(conversation)
        answers = assistant_turns(messages)
        if not answers or answers == [len(messages) - 1]:  # nothing follows its one answer
            return Examples([conversation], [shape], True, False)
        rewritten = self._is_rewritten(conversation, shape)
        if self._mode == "whole" or (self._mode == "auto" and not rewritten):
            return Examples([conversation], [shape], True, rewritten)
        answers = answers[-1:] if self._last_only else answers
        answers = [k for k in answers if k not in conversation.untrained]
        if not answers:
            raise FormatError("there is no assistant turn to train on")
        conversations = [conversation._replace(messages=messages[: k + 1]) for k in answers]
        if shape is None:  # that of a beginning may be known
            shapes = list(map(self._encoder.shape, conversations))
        else:
            shapes = [shape[: 1 + FIELDS * (k + 1)] for k in answers]
        return Examples(conversations, shapes, False, rewritten)

    def _is_rewritten(self, conversation: Conversation, shape: Shape | None) -> bool:
        if shape is None or not self._encoder.history_depends_on_shape(conversation):
            return self._encoder.rewrites_history(conversation)
        if shape not in self._rewritten:
            self._rewritten[shape] = self._encoder.rewrites_history(conversation)
        return self._rewritten[shape]
