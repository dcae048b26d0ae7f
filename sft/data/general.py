"""The general rows, of what a model could do before its training: their loss tells what was forgotten."""

from collections.abc import Sequence
from pathlib import Path

from sft.data.chat import ChatEncoder
from sft.data.conversation import Conversation, assistant_turns, strings
from sft.data.row_formats import RowReader
from sft.data.rows import expand, read_rows
from sft.errors import DataError, FormatError
from sft.recipe import Recipe, Source

BUNDLED = Path(__file__).resolve().parents[2] / "data" / "general"


def read_general(recipe: Recipe) -> list[tuple[str, Conversation]]:
    """The rows of evaluation.general, each with its "file:line". They have no system prompt but their own.

    Raises: RecipeError: there is no such file; DataError: a row that is no conversation with an answer.
    """
    chosen = recipe.evaluation.general
    if chosen == "off":
        return []
    pattern = f"{BUNDLED}/*.jsonl" if chosen == "bundled" else chosen
    rows = []
    for file in expand(Source(pattern), recipe, "evaluation.general"):
        reader = RowReader("auto", None if chosen == "bundled" else recipe.dataset.columns, None)
        shown = Path("data", "general", file.name) if isinstance(file, Path) and chosen == "bundled" else file
        for line, row in read_rows(file):
            try:
                if isinstance(row, FormatError):
                    raise row
                conversation = reader.read(row)
                if not set(assistant_turns(conversation.messages)) - conversation.untrained:
                    raise FormatError("there is no answer to measure")
            except FormatError as error:
                raise DataError(f"{shown}:{line}: {error}; mend the row, or name another evaluation.general") from None
            rows.append((f"{shown}:{line}", conversation))
    return rows


def encodable(rows: Sequence[tuple[str, Conversation]], encoder: ChatEncoder) -> list[tuple[str, Conversation]]:
    """The rows that this tokenizer and chat template can take, every letter of them."""
    known = [row for row in rows if not _has_unknown_token(row[1], encoder)]
    encoded = encoder.encode_batch([conversation for _, conversation in known])
    return [row for row, made in zip(known, encoded, strict=True) if not isinstance(made, FormatError)]


def _has_unknown_token(conversation: Conversation, encoder: ChatEncoder) -> bool:
    """Whether the tokenizer has no token for some text, on which a loss says nothing: some know no Chinese."""
    unknown, tokenizer = encoder.tokenizer.unk_token_id, encoder.tokenizer
    texts = [text for message in conversation.messages for text in strings(message.get("content"))]
    return unknown is not None and any(unknown in tokenizer.encode(text, add_special_tokens=False) for text in texts)
