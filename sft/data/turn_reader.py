"""The fast path of encoding: answers read off the ids of many rows at once, from the header's ids to the next stop id.

That is exact because neither can come from content (control_tokens.py), and it is used only where the number of
headers found is the number of turns, and where the careful way (answer_spans.py) gave the same for another row of this
shape.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from sft.data.answer_spans import Render, common_length
from sft.data.control_tokens import PRIVATE_USE, ControlTokens
from sft.data.conversation import Conversation, assistant_turns
from sft.errors import FormatError

Shape = tuple[object, ...]  # what a template may branch on: are there tools, and FIELDS of each message
FIELDS = 4  # role, number of keys, tool calls, reasoning
Turn = tuple[int, int]  # the half-open range of a row's ids that carries loss, its stop token included


class ReadRow(NamedTuple):
    """What was read off one row.

    sound: each header has its stop before the next header and the row's end. last_sound: the last header has.
    """

    turns: list[Turn]
    sound: bool
    last_sound: bool


class TurnReader:
    """Knows the ids of the header before an answer, and the shapes for which reading turns off the ids is proven.

    unwritten_prompt: what a generation prompt holds beyond the header that rendered turns have; "" mostly.
    whole_header: the header with that.
    """

    def __init__(self, render: Render, control: ControlTokens, rust: Tokenizer):
        self._render, self._control, self._rust = render, control, rust
        self.knows_header = False
        self.unwritten_prompt = self.whole_header = ""
        self._header_ids: list[int] = []
        self._proven: dict[Shape, bool] = {}

    def shape(self, conversation: Conversation) -> Shape | None:
        """The conversation's shape; None if its turns may not be read off the ids.

        They may not where a text spells a control token, or an answer might join its header.
        """
        messages, tools, _ = conversation
        shape: list[object] = [bool(tools)]
        control, prefix = self._control, self._control.prefix
        for message in messages:
            role, content = message["role"], message.get("content")
            if role == "assistant" and (not content or content[0].isspace()):
                return None
            shape += role, len(message), "tool_calls" in message, "<think>" in content if content else None
            # The common case apart, for speed: texts without even the first characters of a control token.
            for value in message.values():
                if (type(value) is not str or prefix in value) and control.find(value):
                    return None
        if control.normalizer is not None and control.find(messages):
            return None
        return None if tools and control.find(tools) else tuple(shape)

    def is_proven(self, shape: Shape) -> bool | None:
        """None: no row of this shape has been compared yet."""
        return self._proven.get(shape)

    def record(self, shape: Shape, same: bool) -> None:
        """Notes whether a row of this shape, encoded with care, has the turns that were read off its ids."""
        self._proven[shape] = same

    def learn_header(self, conversation: Conversation) -> None:
        """Takes the ids of the header before the first answer, if it begins with a control token."""
        messages, tools, _ = conversation
        k = next(iter(assistant_turns(messages)), 0)
        if not k:
            return  # this row has no answer after something; the next batch tries again
        try:
            history, prompt = self._render(messages[:k], tools), self._render(messages[:k], tools, prompt=True)
            answered = self._render([*messages[:k], {"role": "assistant", "content": PRIVATE_USE[0]}], tools)
        except FormatError:
            return  # this row says so itself
        pattern = self._control.pattern
        end = common_length(prompt, answered, pattern)
        begin = common_length(prompt, history, pattern)
        header = prompt[begin:end]
        self.knows_header = True
        if pattern.match(header):
            self._header_ids = list(self._rust.encode(header, add_special_tokens=False).ids)
            self.unwritten_prompt, self.whole_header = prompt[end:], prompt[begin:]

    def read(self, rows: Sequence[np.ndarray], stop_ids: set[int]) -> list[ReadRow]:
        """The turns of each row of ids, all rows in one sweep.

        For example two rows, with the header 1 2 and the stop id 9:

            index   0 1 2 3 4   5 6 7 8 9 10      row 0 ends at 5, row 1 at 11
            flat    5 1 2 7 9   5 1 2 7 8 9
            starts        3           8           just after each header
            stops           5               11    just after the first 9 behind each start
            turns   (3, 5) of row 0; of row 1, which begins at 5, (3, 6)
        """
        lengths = np.array([len(row) for row in rows])
        row_ends = np.cumsum(lengths)
        row_begins = row_ends - lengths
        flat = np.concatenate(rows)
        starts = self._after_headers(flat)
        after_stops = np.flatnonzero(np.isin(flat, list(stop_ids))) + 1
        stops = np.append(after_stops, len(flat) + 1)[np.searchsorted(after_stops, starts, side="right")]
        row_of_start = np.searchsorted(row_ends, starts, side="left")  # a header ends at > its row's begin
        clipped = np.minimum(row_of_start, len(rows) - 1)
        unsound = (stops > np.append(starts[1:], len(flat) + 1)) | (stops > row_ends[clipped])
        begins = row_begins[clipped]
        turns = list(zip((starts - begins).tolist(), (stops - begins).tolist(), strict=True))
        bounds = np.searchsorted(row_of_start, np.arange(len(rows) + 1)).tolist()
        flaws = np.append(0, np.cumsum(unsound))[bounds].tolist()  # up to each row
        lasts = np.append(unsound, True)[np.array(bounds[1:], dtype=np.int64) - 1].tolist()
        return [
            ReadRow(turns[bounds[j] : bounds[j + 1]], flaws[j] == flaws[j + 1], not lasts[j]) for j in range(len(rows))
        ]

    def _after_headers(self, flat: np.ndarray) -> np.ndarray:
        """The places just after each occurrence of the header's ids."""
        width = len(self._header_ids)
        if not width or len(flat) < width:
            return np.array([], dtype=np.int64)
        match = np.ones(len(flat) - width + 1, dtype=bool)
        for offset, token in enumerate(self._header_ids):
            match &= flat[offset : len(flat) - width + 1 + offset] == token
        return np.flatnonzero(match) + width
