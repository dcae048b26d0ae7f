"""One file's rows -> token rows, in batches, with an account of what became of every row."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa

from sft.data.chat import ChatEncoder, Encoded
from sft.data.conversation import Conversation, assistant_turns
from sft.data.examples import REWRITTEN, ExampleMaker, Examples
from sft.data.reasoning import NOT_WRITTEN
from sft.data.row_formats import RowReader
from sft.data.signatures import signatures, text_of
from sft.data.turn_reader import Turn
from sft.errors import ControlTokenError, DataError, FormatError
from sft.recipe import Recipe, Source

BATCH = 1000  # rows tokenised at once, fewer where they are long:
BATCH_CHARACTERS = 2**24  # far below the 2**31 tokens that an Arrow list of a batch can hold
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("assistant_mask", pa.list_(pa.int8())),
        ("line", pa.int32()),
        ("hash", pa.int64()),  # of the row: its examples are several token rows, one after another, with one hash
    ]
)
HOPELESS = 1000  # rows: a file that begins with so many bad ones is of another kind, and is not read to its end
UNTRAINED = "answers that their rows take out of the loss"
UNREADABLE, CONTROL, OVERLONG, SHORTENED = "bad row", "control token", "over-long", "over-long answer"


class Problem(NamedTuple):
    """A row that was not used (UNREADABLE, CONTROL, OVERLONG), or of which some examples were not (SHORTENED).

    line: counted from 1.
    """

    line: int
    kind: str
    message: str


class TokenRow(NamedTuple):
    """An example in tokens.

    input_ids: int32; turns: the ranges of these that carry loss; untrained: answers that the row takes out of the loss.
    """

    line: int
    input_ids: np.ndarray
    turns: list[Turn]
    trimmed: bool
    notes: tuple[str, ...]
    untrained: int = 0


class Facts(TypedDict, total=False):
    """A file's part of the ledger.

    examples: what the used rows gave, if not one each; trimmed: lines; stop_ids: ids that end an answer in this file.
    """

    sha256: str
    format: str | None
    rows: int
    used: int
    examples: int
    trimmed: list[int]
    tokens: int
    supervised_tokens: int
    notes: dict[str, int]
    stop_ids: list[int]


# --------------------------------------------------------------------------------------------------------- tokenising


class Tokeniser:
    """The examples of a row in, token rows and problems out."""

    def __init__(self, encoder: ChatEncoder, recipe: Recipe):
        self._encoder = encoder
        self._max_length = recipe.dataset.max_length
        self._trims = recipe.dataset.overlength == "trim"
        self._last_turn_only = recipe.chat.loss_on == "last_turn"

    def tokenise(
        self, line: int, examples: Examples, encoded: Sequence[Encoded | FormatError]
    ) -> tuple[list[TokenRow], Problem | None]:
        """encoded: what the encoder made of the examples, in a batch with others."""
        try:
            sound: list[Encoded] = []
            for each in encoded:
                if isinstance(each, FormatError):
                    raise each
                sound.append(each)
            make = self._each_answer if examples.answers else self._whole
            return make(line, examples, sound)
        except FormatError as error:
            return [], Problem(line, CONTROL if isinstance(error, ControlTokenError) else UNREADABLE, str(error))

    def _whole(
        self, line: int, examples: Examples, encoded: Sequence[Encoded]
    ) -> tuple[list[TokenRow], Problem | None]:
        conversation, whole = examples.conversation, encoded[0]
        turns = self._trained_turns(conversation, whole)
        if not turns:
            raise FormatError("there is no assistant turn to train on")
        trimmed = len(whole.input_ids) > self._max_length
        if trimmed:
            shorter = self._trimmed(conversation, whole) if self._trims else None
            turns = [] if shorter is None else self._trained_turns(conversation, shorter)
            if shorter is None or not turns:
                return [], self._overlong(line, len(whole.input_ids))
            whole = shorter
        answers = assistant_turns(conversation.messages)[: len(whole.turns)] if conversation.untrained else []
        untrained = len(conversation.untrained.intersection(answers))
        return [_token_row(line, whole, turns, trimmed, untrained)], None

    def _each_answer(
        self, line: int, examples: Examples, encoded: Sequence[Encoded]
    ) -> tuple[list[TokenRow], Problem | None]:
        """Over-long examples are left out; cut to what fits they would be the examples before them."""
        lengths = [len(each.input_ids) for each in encoded]
        rows = [_token_row(line, e, e.turns[-1:]) for e in encoded if len(e.input_ids) <= self._max_length]
        if not rows:
            return [], self._overlong(line, min(lengths))
        rows[0] = rows[0]._replace(untrained=len(examples.conversation.untrained))
        if len(rows) == len(encoded):
            return rows, None
        lost = f"{len(encoded) - len(rows):,} of its {len(encoded):,} answers end after more than dataset.max_length"
        return rows, Problem(line, SHORTENED, f"{lost} {self._max_length:,} tokens, the last after {max(lengths):,}")

    def _trained_turns(self, conversation: Conversation, encoded: Encoded) -> list[Turn]:
        """The turns that carry loss, of the conversation or of a beginning of it."""
        turns = list(encoded.turns)
        if conversation.untrained:
            answers = zip(assistant_turns(conversation.messages), turns, strict=False)
            turns = [turn for answer, turn in answers if answer not in conversation.untrained]
        return [turn for turn in turns if turn == encoded.turns[-1]] if self._last_turn_only else turns

    def _trimmed(self, conversation: Conversation, encoded: Encoded) -> Encoded | None:
        """The longest beginning that ends with an answer and fits, encoded as the conversation that it then is."""
        messages, tools, _ = conversation
        for answer, (_, stop) in reversed(list(zip(assistant_turns(messages), encoded.turns, strict=True))):
            if stop <= self._max_length and answer + 1 < len(messages):
                shorter = self._encoder.encode(messages[: answer + 1], tools)
                if len(shorter.input_ids) <= self._max_length:
                    return shorter
        return None

    def _overlong(self, line: int, length: int) -> Problem:
        message = f"{length:,} tokens, more than dataset.max_length {self._max_length:,}"
        message += ", and its first answer does not end within it" if self._trims else ""
        return Problem(line, OVERLONG, message)


def _token_row(
    line: int, encoded: Encoded, turns: Sequence[Turn], trimmed: bool = False, untrained: int = 0
) -> TokenRow:
    ids = np.ascontiguousarray(encoded.input_ids, dtype=np.int32)
    return TokenRow(line, ids, list(turns), trimmed, encoded.notes, untrained)


class FileTokeniser:
    """Tokenises one file, row by row in order, and counts what became of the rows.

    problems: of the rows so far, not in order. source: says their format and the names of their keys. signatures: where
    those of the rows are written, if they are to be.
    """

    def __init__(self, encoder: ChatEncoder, recipe: Recipe, source: Source, signatures: BinaryIO | None = None):
        self.problems: list[Problem] = []
        self.rows_read = 0
        self._encoder, self._tokeniser = encoder, Tokeniser(encoder, recipe)
        self.reader = RowReader(source.format, recipe.dataset.columns_of(source), recipe.dataset.system)
        self._examples = ExampleMaker(encoder, recipe.chat)
        self._stops_at_problems = recipe.dataset.on_error == "error"
        self._signatures = signatures
        self._trimmed: list[int] = []
        self._notes: dict[str, int] = defaultdict(int)
        self._used = self._made = self._tokens = self._supervised = 0

    def batches(self, rows: Iterable[tuple[int, Any]], file: object = "rows") -> Iterator[pa.RecordBatch]:
        """Arrow batches of SCHEMA. While one batch is in the tokenizer's Rust code the next is read and rendered.

        Raises: DataError: the rows are of another kind: bad ones are errors, and there is none but these.
        """
        stream = self._rows(rows, file)
        with ThreadPoolExecutor(1) as pool:
            pending: Future[list[Encoded | FormatError]] | None = None
            waiting: list[tuple[int, Examples]] = []
            while True:
                batch = _next_batch(stream)
                rendered = self._encoder.render_batch(*self._examples.flat(examples for _, examples in batch))
                following = pool.submit(self._encoder.encode_rendered, rendered) if batch else None
                if pending is not None:
                    yield self._to_arrow(waiting, pending.result())
                if following is None:
                    return
                pending, waiting = following, batch

    def facts(self) -> Facts:
        examples: Facts = {} if self._made == self._used else {"examples": self._made}
        return {
            "format": self.reader.format.name if self.reader.format else None,
            "rows": self.rows_read,
            "used": self._used,
            **examples,
            "trimmed": self._trimmed,
            "tokens": self._tokens,
            "supervised_tokens": self._supervised,
            "notes": dict(self._notes),
            "stop_ids": sorted(self._encoder.stop_ids),
        }

    def _rows(self, rows: Iterable[tuple[int, Any]], file: object) -> Iterator[tuple[int, Examples]]:
        """Rows as examples; those that are no conversations go to `problems`."""
        for line, row in rows:
            if self.rows_read == len(self.problems) == HOPELESS and self._stops_at_problems:
                line, _, message = self.problems[0]
                raise DataError(f"{file}:{line}: {message}\nand so on: no row of the first {HOPELESS:,} can be used")
            self.rows_read += 1
            try:
                if isinstance(row, FormatError):
                    raise row
                yield line, self._examples.make(self.reader.read(row))
            except FormatError as error:
                self.problems.append(Problem(line, UNREADABLE, str(error)))

    def _to_arrow(self, batch: list[tuple[int, Examples]], encoded: list[Encoded | FormatError]) -> pa.RecordBatch:
        rows: list[TokenRow] = []
        hashes: list[bytes] = []
        said: list[str] = []  # by the rows, once for each example
        begin = 0
        for line, examples in batch:
            end = begin + (len(examples.answers) or 1)
            made, problem = self._tokeniser.tokenise(line, examples, encoded[begin:end])
            begin = end
            if problem is not None:
                self.problems.append(problem)
            if made:
                rows += made
                digest = hashlib.blake2b(made[0].input_ids.data, digest_size=8)
                for row in made[1:]:
                    digest.update(row.input_ids.data)
                hashes += [digest.digest()] * len(made)
                self._count(made, examples)
                if self._signatures:
                    said += [text_of(examples.conversation.messages)] * len(made)
        if self._signatures:
            self._signatures.write(signatures(said).tobytes())
        lengths = [len(row.input_ids) for row in rows]
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        # +1 where a turn starts, -1 where it stops; summed up that is the mask. Turns are apart and not empty.
        edges = np.zeros(offsets[-1] + 1, dtype=np.int8)
        begins = list(zip(offsets.tolist(), rows, strict=False))
        edges[[begin + start for begin, row in begins for start, _ in row.turns]] += 1
        edges[[begin + stop for begin, row in begins for _, stop in row.turns]] -= 1
        list_offsets = pa.array(offsets).cast(pa.int32())  # raises past 2**31
        ids = np.concatenate([np.zeros(0, np.int32), *(row.input_ids for row in rows)])
        return pa.record_batch(
            [
                pa.ListArray.from_arrays(list_offsets, pa.array(ids)),
                pa.ListArray.from_arrays(list_offsets, pa.array(np.cumsum(edges[:-1], dtype=np.int8))),
                pa.array([row.line for row in rows], pa.int32()),
                pa.array(np.frombuffer(b"".join(hashes), dtype=np.int64)),
            ],
            schema=SCHEMA,
        )

    def _count(self, made: list[TokenRow], examples: Examples) -> None:
        """Counts a row that is used, by its examples."""
        self._used += 1
        self._made += len(made)
        for row in made:
            self._tokens += len(row.input_ids)
            self._supervised += sum(stop - start for start, stop in row.turns)
        if made[0].trimmed:
            self._trimmed.append(made[0].line)
        if untrained := sum(row.untrained for row in made):
            self._notes[UNTRAINED] += untrained
        if examples.is_rewritten:
            self._notes[REWRITTEN] += 1
        if self._encoder.leaves_out_reasoning(examples.conversation):
            self._notes[NOT_WRITTEN] += 1
        for note in made[0].notes if len(made) == 1 else dict.fromkeys(note for row in made for note in row.notes):
            self._notes[note] += 1


def _next_batch(stream: Iterator[tuple[int, Examples]]) -> list[tuple[int, Examples]]:
    batch: list[tuple[int, Examples]] = []
    count = characters = 0
    for item in stream:
        batch.append(item)
        examples = item[1]
        times = len(examples.answers) or 1
        count += times
        for message in examples.conversation.messages:
            characters += times * len(message.get("content") or "")
        if count >= BATCH or characters > BATCH_CHARACTERS:
            break
    return batch
