"""Which tokens carry loss in another tool, beside ours, shown on two rows.

By the table of a tool, `labels.trains`, or of what one of its keys (`labels.keys`) says:
  answers         as here: each answer and its stop token
  turn_end        and what the template writes from there to the next turn, e.g. the line break of ChatML
  last_turn       the last answer alone, as turn_end
  last_turn_end   each answer; its stop token, and what follows, only behind the last
  last_turn_only  the last answer alone, as last_turn_end
  generation      what the template marks with {% generation %}: as here, where it marks the answers and stop tokens
  everything      every token
"""

from collections.abc import Iterator
from datetime import date
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sft.data.chat import ChatEncoder, Encoded
from sft.data.conversation import Conversation
from sft.data.row_formats import RowReader
from sft.data.rows import expand, read_rows
from sft.errors import FormatError
from sft.plain_text import plain_text
from sft.recipe import Recipe
from sft.starting.tool_files import ToolFile
from sft.starting.tool_keys import tables

ROWS = 2
SHOWN = 60  # characters of a stretch of tokens
MARKS = {(True, True): "[[{}]]", (False, True): "{{+{}+}}", (True, False): "{{-{}-}}", (False, False): "{}"}
LEGEND = "[[ ]] trained on in both, {{+ +}} in {} alone, {{- -}} here alone; \\n is a line break"
BUILT_IN = (
    [{"role": "user", "content": "How deep is it?"}, {"role": "assistant", "content": "Forty fathoms."}],
    [
        {"role": "user", "content": "Twice 2?"},
        {"role": "assistant", "content": "4."},
        {"role": "user", "content": "And 3?"},
        {"role": "assistant", "content": "6."},
    ],
)


def rule_of(source: ToolFile) -> str:
    """What is trained on there, by the tool's table and the recipe's keys."""
    labels = tables()[source.tool]["labels"]
    for key, rules in labels["keys"].items():
        if key in source.keys and (rule := rules.get(source.keys[key].value)):
            return rule
    return labels["trains"]


def labels_shown(source: ToolFile, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first rows of the data, or two of ours where it is not here, with what carries loss here and there."""
    encoder = ChatEncoder(tokenizer, "text", recipe.chat.loss_on == "after_thinking", date.today().isoformat())
    rule, shown, differs = rule_of(source), [], False
    for place, conversation in islice(_rows(recipe), ROWS):
        encoded = encoder.encode(conversation.messages, conversation.tools)
        here = _here(encoded, recipe.chat.loss_on == "last_turn")
        there = trained_there(rule, encoded, tokenizer)
        differs |= here != there
        shown.append(f"{place}\n{marked(tokenizer, encoded.input_ids, here, there)}")
    if not differs:
        return f"labels: on the first rows the same tokens as in {source.tool}"
    return "\n".join([f"labels: {LEGEND.format(source.tool)}", *shown])


def _rows(recipe: Recipe) -> Iterator[tuple[str, Conversation]]:
    """Rows of the first file, if it is here and they can be read; else the two of ours."""
    first = recipe.dataset.train[0]
    if Path(first.path).is_file():
        (file,) = expand(first, recipe, "dataset.train")
        reader = RowReader(first.format, recipe.dataset.columns_of(first), recipe.dataset.system)
        for line, row in read_rows(file):
            if not isinstance(row, FormatError):
                yield f"{file}:{line}", reader.read(row)
    else:
        yield from (("an example of ours", Conversation(messages, None)) for messages in BUILT_IN)


def _here(encoded: Encoded, last_only: bool) -> list[bool]:
    mask = [False] * len(encoded.input_ids)
    for start, stop in list(encoded.turns)[-1 if last_only else 0 :]:
        mask[start:stop] = [True] * (stop - start)
    return mask


def trained_there(rule: str, encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """For each token whether it carries loss by the rule."""
    if rule == "everything":
        return [True] * len(encoded.input_ids)
    mask = _here(encoded, rule in ("last_turn", "last_turn_only"))
    if rule in ("answers", "generation"):
        return mask
    for number, (_, stop) in enumerate(encoded.turns, start=1):
        is_last = number == len(encoded.turns)
        if rule == "last_turn_end" and not is_last:
            mask[stop - 1] = False
        elif mask[stop - 1]:
            while stop < len(mask) and not str(tokenizer.decode(encoded.input_ids[stop])).strip():
                mask[stop] = True
                stop += 1
    return mask


def marked(tokenizer: PreTrainedTokenizerBase, ids: Any, here: list[bool], there: list[bool]) -> str:
    """The row as text, each stretch in the marks of who trains on it; long ones shortened."""
    pieces = []
    for kind, group in groupby(range(len(ids)), key=lambda i: (here[i], there[i])):
        text = str(tokenizer.decode([int(ids[i]) for i in group], skip_special_tokens=False)).replace("\n", "\\n")
        text = text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"
        pieces.append(MARKS[kind].format(plain_text(text)))
    return "".join(pieces)
