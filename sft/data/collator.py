"""Rows -> a batch with labels; the one place that writes labels."""

import os.path
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from sft.errors import UserError


class DataCollatorForCompletionOnlyLM(DataCollatorForLanguageModeling):
    """Pads rows and labels the assistant's tokens; every other label is `ignore_index`.

    Rows that bring an `assistant_mask` (what sft/data makes) are labelled by it. Rows of bare ids are scanned for the
    two templates, as the class of this name did in trl up to 0.19, whose arguments and keys these are.

    Args:
        response_template: text or ids after which an answer begins; needed for rows without a mask.
        instruction_template: text or ids where the other side's next turn begins; without it a row has one answer,
            which begins after the last response template.
        mlm: must be False; it is here because the class had it.
        ignore_index: the label that carries no loss.
        padding_free: put the rows one after another into one instead of padding them.
        pad_to_multiple_of: pad the longest row, or the one row, up to a multiple of this.

    Returns: input_ids, labels, attention_mask: int64, (rows, longest row). With `padding_free`, or of rows that are
    packed (`seq_lengths`), one row of all conversations, without an attention mask, by which they would see each
    other: input_ids, labels, position_ids: int64, (1, all tokens); cu_seq_lens_q/k: int32, (conversations + 1,);
    max_length_q/k: int, tokens of the longest conversation; seq_idx: int32, (1, all tokens), the conversation's number.

    Warns: UserWarning: a row of bare ids has none of a template; it gets no loss.
    Raises: UserError: neither mask nor response template; an empty template; mlm.

    Source: label rule of trl<=0.19 DataCollatorForCompletionOnlyLM (gone in trl 0.20, huggingface/trl#3704); keys of
    trl 1.16 DataCollatorForLanguageModeling(padding_free=True).
    """

    def __init__(
        self,
        response_template: str | Sequence[int] | None = None,
        instruction_template: str | Sequence[int] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        mlm: bool = False,
        ignore_index: int = -100,
        padding_free: bool = False,
        **kwargs: Any,
    ):
        if mlm:
            raise UserError("DataCollatorForCompletionOnlyLM is for causal language models: mlm must be False")
        if tokenizer is None:
            raise UserError("DataCollatorForCompletionOnlyLM needs a tokenizer")
        super().__init__(tokenizer, mlm=mlm, **kwargs)
        self.response_template = response_template
        self.instruction_template = instruction_template
        self.ignore_index = ignore_index
        self.padding_free = padding_free
        self.response_token_ids = self._template_ids(response_template, "response_template")
        self.instruction_token_ids = self._template_ids(instruction_template, "instruction_template")
        self._added = set(tokenizer.get_added_vocab().values())
        self._pieces: dict[int, str] = {}

    def _template_ids(self, template: str | Sequence[int] | None, name: str) -> list[int] | None:
        if template is None:
            return None
        if not len(template):
            raise UserError(f"{name} is empty")
        return (
            self.tokenizer.encode(template, add_special_tokens=False) if isinstance(template, str) else list(template)
        )

    def torch_call(self, examples: Sequence[Any]) -> dict[str, Any]:
        rows = [_as_row(example) for example in examples]
        labels = [self._labels(row) for row in rows]
        if self.padding_free or any("seq_lengths" in row for row in rows):
            return self._in_one_row(rows, labels)
        width = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            width += -width % self.pad_to_multiple_of
        left = self.tokenizer.padding_side == "left"
        pad_id = self._pad_id() if any(len(row["input_ids"]) < width for row in rows) else 0

        def padded(values: list[list[int]], filler: int) -> torch.Tensor:
            fill = [[filler] * (width - len(value)) for value in values]
            return torch.tensor([f + v if left else v + f for v, f in zip(values, fill, strict=True)], dtype=torch.long)

        batch = {"input_ids": padded([row["input_ids"] for row in rows], pad_id)}
        batch["labels"] = padded(labels, self.ignore_index)
        batch["attention_mask"] = padded([row.get("attention_mask", [1] * len(row["input_ids"])) for row in rows], 0)
        return batch

    def _in_one_row(self, rows: list[dict[str, Any]], labels: list[list[int]]) -> dict[str, Any]:
        """Conversations one after another, and where each begins, for attention of every kind to keep them apart.

        Conversations of 3 and 2 tokens, padded to a multiple of 4:

            input_ids      [[2, 7, 1, 6, 1, 0, 0, 0]]
            labels         [[-100, 7, 1, -100, 1, -100, -100, -100]]
            position_ids   [[0, 1, 2, 0, 1, 0, 1, 2]]     # the padding is a conversation of its own
            cu_seq_lens_q  [0, 3, 5, 8]                   # tokens before each conversation, and of all
            seq_idx        [[0, 0, 0, 1, 1, 2, 2, 2]]
        """
        ids: list[int] = []
        flat: list[int] = []
        lengths: list[int] = []
        for row, row_labels in zip(rows, labels, strict=True):
            real = row.get("attention_mask", [1] * len(row["input_ids"]))  # a row may bring its own padding
            ids += [token for token, kept in zip(row["input_ids"], real, strict=True) if kept]
            flat += [label for label, kept in zip(row_labels, real, strict=True) if kept]
            lengths += row["seq_lengths"] if "seq_lengths" in row else [sum(real)]
        if padding := -len(ids) % (self.pad_to_multiple_of or 1):
            ids += [self._pad_id()] * padding
            flat += [self.ignore_index] * padding
            lengths.append(padding)
        lengths = [length for length in lengths if length]
        ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        for start in ends[:-1].tolist():
            flat[start] = self.ignore_index  # nothing of another conversation predicts a first token
        number = torch.arange(len(lengths), dtype=torch.int32)
        return {
            "input_ids": torch.tensor([ids]),
            "labels": torch.tensor([flat]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
            "seq_idx": number.repeat_interleave(torch.tensor(lengths))[None],
        }

    def _pad_id(self) -> int:
        """Raises: UserError: the tokenizer has no pad token."""
        if self.tokenizer.pad_token_id is None:
            raise UserError("rows of unequal length need a pad token, and the tokenizer has none")
        return self.tokenizer.pad_token_id

    # --------------------------------------------------------------------------------------------------- labels

    def _labels(self, row: dict[str, Any]) -> list[int]:
        ids = row["input_ids"]
        mask = row.get("assistant_mask")
        if mask is None:
            real = row.get("attention_mask", [1] * len(ids))  # a row may bring its own padding
            return [label if kept else self.ignore_index for label, kept in zip(self._scanned(ids), real, strict=True)]
        labels = [token if kept else self.ignore_index for token, kept in zip(ids, mask, strict=True)]
        at = 0
        for length in _conversation_lengths(row):
            if length:
                labels[at] = self.ignore_index  # a conversation's first token follows nothing
            at += length
        return labels

    def _scanned(self, ids: list[int]) -> list[int]:
        """Labels by the templates: from after each response template up to where the next turn begins."""
        if self.response_token_ids is None:
            raise UserError("the rows bring no assistant_mask; give response_template to find the answers by")
        nothing = [self.ignore_index] * len(ids)
        answers = self._find(ids, self.response_template, self.response_token_ids)
        if not answers:
            self._warn(self.response_template, "response", ids)
        if self.instruction_token_ids is None:
            start = answers[-1][1] if answers else len(ids)
            return nothing[:start] + ids[start:]
        questions = [begin for begin, _ in self._find(ids, self.instruction_template, self.instruction_token_ids)]
        if not questions:
            self._warn(self.instruction_template, "instruction", ids)
            return nothing
        ends = [*questions, *(begin for begin, _ in answers), len(ids) - self._cut_template(ids)]
        opener = self.response_token_ids[0]
        if opener in self._added and opener == self.instruction_token_ids[0]:
            # Every turn begins with this control token, also a tool's, whose template nobody gave.
            ends += [i for i, token in enumerate(ids) if token == opener]
        labels = list(nothing)
        for _, start in answers:
            stop = min((end for end in ends if end >= start), default=start)
            labels[start:stop] = ids[start:stop]
        return labels

    def _cut_template(self, ids: list[int]) -> int:
        """How many tokens of an instruction template stand at the row's end, its rest cut away by truncation."""
        template = self.instruction_token_ids or []
        return next((n for n in range(len(template) - 1, 0, -1) if ids[-n:] == template[:n]), 0)

    def _find(self, ids: list[int], template: Any, template_ids: list[int]) -> list[tuple[int, int]]:
        """Each occurrence as (its first token, the token after it): by ids, and by what other ids spell the same text.

        White space around a text template is what merges with its neighbours ("\\n" + "\\n### Human:"): a token that
        spans such an edge belongs to the neighbour.
        """
        width = len(template_ids)
        found = {i: i + width for i in range(len(ids) - width + 1) if ids[i : i + width] == template_ids}
        if isinstance(template, str) and (core := self._spelling(template_ids).strip()):
            whole = self._spelling(template_ids)
            before, after = whole[: whole.index(core)], whole[whole.index(core) + len(core) :]
            pieces = [self._piece(token) for token in ids]
            begins = [0]
            for piece in pieces:
                begins.append(begins[-1] + len(piece))
            text = "".join(pieces)
            for match in re.finditer(re.escape(core), text):
                first_char = match.start() - len(os.path.commonprefix([before[::-1], text[: match.start()][::-1]]))
                last_char = match.end() + len(os.path.commonprefix([after, text[match.end() :]]))
                first = next(i for i, begin in enumerate(begins) if begin >= first_char)
                if begins[first] > match.start():
                    first = next(i for i, end in enumerate(begins[1:]) if end > match.start())
                last = max(i for i, begin in enumerate(begins) if begin <= last_char)
                if begins[last] < match.end():  # the template's last word runs on into the answer's first token
                    last = next(i for i, begin in enumerate(begins) if begin >= match.end())
                if not any(begin < last and first < end for begin, end in found.items()):
                    found[first] = last
        return sorted(found.items())

    def _spelling(self, ids: Sequence[int]) -> str:
        return "".join(self._piece(token) for token in ids)

    def _piece(self, token: int) -> str:
        """What a token adds to a text; a control token is its number, so that its spelling is not it."""
        if token not in self._pieces:
            if token in self._added:
                self._pieces[token] = f"\ue000{token}\ue001"
            else:
                # After another token, since SentencePiece decoders drop the space of a first one.
                anchor = self.tokenizer.encode("a", add_special_tokens=False)[-1:]
                before, after = (
                    self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                    for ids in (anchor, [*anchor, token])
                )
                self._pieces[token] = str(after[len(before) :])
        return self._pieces[token]

    def _warn(self, template: Any, kind: str, ids: list[int]) -> None:
        warnings.warn(
            f"Could not find {kind} key `{template}` in the following instance: {self.tokenizer.decode(ids)}. "
            "This instance will be ignored in loss calculation. Note, if this happens often, consider increasing the "
            "`max_length`.",
            UserWarning,
            stacklevel=4,
        )


def _as_row(example: Any) -> dict[str, Any]:
    row = dict(example) if isinstance(example, Mapping) or hasattr(example, "keys") else {"input_ids": example}
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()}


def _conversation_lengths(row: dict[str, Any]) -> list[int]:
    return list(row.get("seq_lengths", [len(row["input_ids"])]))
