"""Control tokens: which they are, where text spells one, and how spelled ones are kept text.

A control token ends or begins something (`<|im_end|>`, `<s>`): a special token of the tokenizer, or an added token
that its chat template writes around the messages. Content that spells one must never become one.
"""

import json
import os.path
import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase

from sft.data.conversation import Message, Tools, strings
from sft.errors import FormatError

# Private-use characters: one that the text does not hold stands for an answer, another one splits a spelled token.
PRIVATE_USE = [chr(code) for code in range(0xE000, 0xE040)]

# Added tokens of some tokenizers that an answer writes itself, also where a template begins an answer with one.
WRITTEN_BY_ANSWERS = {"<think>", "</think>", "<tool_call>", "</tool_call>"}


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens at first, more by `add`.

    tokens: their texts. pattern: finds the longest at a place. ids: theirs, without the unknown token's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rust: Tokenizer):
        self._tokenizer, self._rust = tokenizer, rust
        self._dropping: dict[str, Tokenizer] = {}
        self.tokens = {token for token in tokenizer.all_special_tokens if token and not token.isspace()}
        self.tokens |= {
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special and not token.content.isspace()
        }
        self._compile()

    def add(self, tokens: Iterable[str]) -> None:
        self.tokens |= set(tokens)
        self._compile()

    def _compile(self) -> None:
        longest_first = sorted(self.tokens, key=lambda token: (-len(token), token))
        self.pattern = _any_of(longest_first)
        # Nearly every text holds none: a search for what all begin with is several times faster than the pattern.
        self.prefix = os.path.commonprefix(longest_first)
        added = self._tokenizer.added_tokens_decoder
        self.ids = {id for id, token in added.items() if token.content in self.tokens}
        self.ids.discard(self._tokenizer.unk_token_id)  # any unknown character may become it
        # A token that is matched after normalisation may be spelled by other characters (NFKC: "＜s＞").
        loose = {t.content for t in added.values() if t.lstrip or t.single_word or t.normalized}
        self.splitting_pattern = _any_of([token for token in longest_first if token not in loose])
        self.normalizer = self._rust.normalizer if any(added[id].normalized for id in self.ids) else None

    def find(self, *values: Any) -> list[str]:
        """The control tokens that texts spell, at any depth of lists and dicts, in their order."""
        found: list[str] = []
        for text in strings(values):
            if self.prefix in text:
                found += self.pattern.findall(text)
            if self.normalizer is not None and self.pattern.search(normal := self.normalizer.normalize_str(text)):
                found += self.pattern.findall(normal)[len(self.pattern.findall(text)) :]
        return found

    def split_spelled(self, messages: list[Message], tools: Tools | None) -> tuple[list[Message], Any, Tokenizer]:
        """Puts a mark into every spelled control token.

        Returns: messages and tools with the marks, and a tokenizer that drops the mark once its own control tokens are
        split off, so that the spelled ones stay text.
        """
        mark = unused_character((messages, tools), reversed(PRIVATE_USE))

        def split(value: Any) -> Any:
            if isinstance(value, str):
                while self.pattern.search(value):  # again, for one token may hold another
                    value = self.pattern.sub(lambda m: m[0][0] + mark + m[0][1:], value)
                return value
            if isinstance(value, dict):
                return {split(key): split(item) for key, item in value.items()}
            return [split(item) for item in value] if isinstance(value, list) else value

        if mark not in self._dropping:
            self._dropping[mark] = _dropping(self._rust, mark)
        return split(messages), split(tools), self._dropping[mark]


def added_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds every added token but those that an answer writes itself: what may prove to be a control token."""
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace()}
    return _any_of(sorted(names - WRITTEN_BY_ANSWERS, key=len, reverse=True))


def unused_character(texts: Any, choice: Iterable[str] = PRIVATE_USE) -> str:
    """A character that stands nowhere in these texts."""
    used = set().union(*strings(texts))
    if (mark := next((c for c in choice if c not in used), None)) is None:
        raise FormatError(f"uses every private-use character from {PRIVATE_USE[0]!a} to {PRIVATE_USE[-1]!a}")
    return mark


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def _dropping(tokenizer: Tokenizer, mark: str) -> Tokenizer:
    """A copy that splits off added tokens first and then removes `mark`, so that a token it splits stays text."""
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["normalized"] = False  # matched before the normaliser runs
    copy = Tokenizer.from_str(json.dumps(state))
    steps = [normalizers.Replace(mark, "")]
    if copy.normalizer is not None:
        steps.append(copy.normalizer)
    copy.normalizer = normalizers.Sequence(steps)
    return copy
