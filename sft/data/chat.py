"""Messages -> input_ids and the token ranges that carry loss, by one rule for every model family.

The text is the model's own chat template over the whole conversation; its ids are the tokenizer's own. All of an
assistant turn between its header and the end of its stop token is supervised (answer_spans.py finds both), also what
the template inserts there (Qwen3's empty `<think>` block), since the model must write it. Nothing else is.

Locating turns in the text is slow (four renderings a turn), so a shape of conversation (its roles, say) is located
once, and from then on its turns are read off the ids (turn_reader.py).

The one hook: a tokenizer with a method `encode_conversation(messages, tools) -> (input_ids, turns)` builds both
itself, and its prompts with `encode_prompt(messages, tools) -> input_ids` (ChatGLM3; see sft/model/chatglm3).
"""

import json
import os.path
from collections.abc import Iterable, Iterator, Sequence, Set
from itertools import dropwhile, takewhile
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from sft.data.answer_spans import locate_turns
from sft.data.chat_template import ChatTemplate
from sft.data.control_tokens import ControlTokens, added_token_pattern
from sft.data.conversation import Conversation, Message, Tools, assistant_turns
from sft.data.history import History
from sft.data.reasoning import Reasoning, forms_not_written, leaves_out
from sft.data.template_probe import probe_template
from sft.data.turn_reader import Shape, Turn, TurnReader
from sft.errors import ControlTokenError, FormatError, ModelError

HEADER_MERGED = "answers whose first character would merge with the header's last token; the header kept its own"
PROMPT_PARTED = "turns that do not begin with their whole generation prompt; the answer begins where the two part"
CONTROL_AS_TEXT = "rows with a spelled control token, encoded as plain text"


class Encoded(NamedTuple):
    """A conversation in tokens.

    input_ids: the whole conversation.
    turns: for each assistant message, the half-open range of `input_ids` that carries loss, its stop token included.
    notes: what the ledger counts of this row (`HEADER_MERGED`, ...).
    """

    input_ids: Sequence[int] | np.ndarray
    turns: Sequence[Turn]
    notes: tuple[str, ...] = ()


class Rendered(NamedTuple):
    """Conversations between the two halves of `encode_batch`.

    careful: the rows that go through `encode`. last_only: rows whose last answer alone carries loss.
    quick, texts, shapes: the others, each with its text and what a template may branch on.
    """

    conversations: Sequence[Conversation]
    careful: list[int]
    quick: list[int]
    texts: list[str]
    shapes: list[Shape]
    last_only: Set[int]


class ChatEncoder:
    """Encodes conversations with one tokenizer and its chat template.

    Args:
        tokenizer: a fast tokenizer with a chat template, or one with the hook above.
        spelled_control_tokens: what becomes of content that spells a control token: "error" or "text".
        after_thinking: whether loss begins after an answer's reasoning.
        day: the "YYYY-MM-DD" that a template shows which asks for today's.

    Raises:
        ModelError: the tokenizer has no chat template, or is not a fast one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        spelled_control_tokens: str = "error",
        after_thinking: bool = False,
        day: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.as_text = spelled_control_tokens == "text"
        self.after_thinking, self.day = after_thinking, day
        self.native = hasattr(tokenizer, "encode_conversation")
        self.stop_ids: set[int] = set()
        self.content_opener: list[int] = []
        if self.native:
            self.stop_ids.update(tokenizer.stop_token_ids)
            return
        template = ChatTemplate(tokenizer, day)
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{type(tokenizer).__name__} is not a fast tokenizer: without offsets its answers cannot be told"
            )
        self.render, self.served, self._fit = template.render, template.served, template.fit
        self._rust = _without_post_processor(tokenizer.backend_tokenizer)
        self._continuations: dict[int, Tokenizer] = {}
        self._added_ids = set(tokenizer.added_tokens_decoder)
        self.control = ControlTokens(tokenizer, self._rust)
        tokens, self._closings, opener = probe_template(self.render, added_token_pattern(tokenizer))
        self.control.add(tokens)
        self.content_opener = list(self._rust.encode(opener, add_special_tokens=False).ids)
        self._reader = TurnReader(self.render, self.control, self._rust)
        self._history = History(template, self.control.pattern)
        self._reasoning = Reasoning(tokenizer, self.render) if after_thinking else None
        self._not_written = forms_not_written(self.render)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as what it was made of: a compiled template cannot be."""
        made_of = self.tokenizer, "text" if self.as_text else "error", self.after_thinking, self.day
        return ChatEncoder, made_of, {"stop_ids": self.stop_ids}

    # --------------------------------------------------------------------------------------------- one conversation

    def encode(self, messages: list[Message], tools: Tools | None = None, last_only: bool = False) -> Encoded:
        """One conversation, located with care.

        Args: last_only: its last answer alone carries loss, so what precedes that is written and encoded as in its
            prompt.
        Raises: FormatError: it cannot be encoded exactly.
        """
        if self.native:
            input_ids, turns = self._native_tokenizer.encode_conversation(messages, tools)
            return Encoded(input_ids, turns[-1:] if last_only else turns)
        notes = []
        messages, rust = self._fit(messages), self._rust
        if spelled := self.control.find(messages, tools):
            if not self.as_text:
                raise ControlTokenError(f"spells the control token {spelled[0]!r}")
            messages, tools, rust = self.control.split_spelled(messages, tools)
            notes.append(CONTROL_AS_TEXT)
        answers = assistant_turns(messages)[-1 if last_only else 0 :]
        located = locate_turns(self.render, messages, tools, self.control.pattern, answers)
        if located.unwritten_prompt:
            notes.append(PROMPT_PARTED)
        text, spans = located.text, located.spans
        if last_only:
            text, spans = self._after_its_prompt(
                text, spans[0], Conversation(messages[: answers[0]], tools), located.unwritten_prompt
            )
        loss_starts = [start for start, _ in spans]
        if self._reasoning is not None:
            asked = zip(answers, spans, strict=True)
            loss_starts = [self._reasoning.end(Conversation(messages, tools), k, text, s) for k, s in asked]
        ids, turns, header_merged = self._tokens_of(text, spans, loss_starts, rust)
        if header_merged:
            notes.append(HEADER_MERGED)
        if sum(map(self.control.ids.__contains__, ids)) != len(self.control.pattern.findall(text)):
            raise FormatError("holds text that this tokenizer can only encode as a control token")
        self.stop_ids.update(ids[stop - 1] for _, stop in turns)
        return Encoded(ids, turns, tuple(notes))

    def _after_its_prompt(
        self, text: str, span: Turn, history: Conversation, unwritten: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text and span of an answer behind what the model is given when it is due.

        Templates may write that otherwise once the answer is there: gpt-oss' drops the reasoning of calls before it.
        unwritten: what its generation prompt holds that the answer does not begin with.
        """
        start, stop = span
        if not history.messages:
            return text, [span]
        prompt = self.render(history.messages, history.tools, prompt=True)
        if text.startswith(prompt, 0, start) or prompt.startswith(text[:start]):
            return text, [span]
        head = prompt.removesuffix(unwritten)
        return head + text[start:], [(len(head), len(head) + stop - start)]

    def encode_prompt(self, messages: list[Message], tools: Tools | None = None) -> list[int]:
        """The ids that the model is given when it must write the next assistant turn after `messages`."""
        if self.native:
            return list(self._native_tokenizer.encode_prompt(messages, tools))
        messages, rust = self._fit(messages), self._rust
        if self.control.find(messages, tools):
            messages, tools, rust = self.control.split_spelled(messages, tools)
        return list(rust.encode(self.render(messages, tools, prompt=True), add_special_tokens=False).ids)

    def stop_tokens(self) -> dict[str, int]:
        """{token: id} of the tokens that end the answers encoded so far."""
        return self.named(self.stop_ids)

    def named(self, ids: Iterable[int]) -> dict[str, int]:
        return {str(self.tokenizer.convert_ids_to_tokens(id)): id for id in sorted(ids)}

    @property
    def _native_tokenizer(self) -> Any:
        return self.tokenizer

    def _tokens_of(
        self, text: str, spans: Sequence[tuple[int, int]], loss_starts: Sequence[int], rust: Tokenizer
    ) -> tuple[list[int], list[Turn], bool]:
        """The ids of a text, its character spans as ranges of these, and whether a header was kept from merging.

        Args: loss_starts: where in each span the range begins.
        """
        encoding = rust.encode(text, add_special_tokens=False)
        firsts = [_token_at(encoding, start, len(text)) for start, _ in spans]
        cuts = [start for (start, _), token in zip(spans, firsts, strict=True) if encoding.offsets[token][0] < start]
        if not cuts:
            firsts = [_token_at(encoding, start, len(text)) for start in loss_starts]
            lasts = [_token_at(encoding, stop - 1, len(text)) for _, stop in spans]
            return encoding.ids, [(first, last + 1) for first, last in zip(firsts, lasts, strict=True)], False
        # An answer's first character would share a token with its header: the text is encoded in pieces, cut there.
        ids, begins = [], []
        for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            for token, offset in self._encode_piece(rust, text[begin:end], continues=bool(begin)):
                ids.append(token)
                begins.append(offset[0] + begin)
        starts, stops = (np.searchsorted(begins, edges).tolist() for edges in zip(*spans, strict=True))
        for i, (at, (start, _)) in enumerate(zip(loss_starts, spans, strict=True)):
            if at > start:  # with the token that holds this character, though it may begin before
                token = int(np.searchsorted(begins, at))
                starts[i] = token if begins[token] == at else token - 1
        return ids, list(zip(starts, stops, strict=True)), True

    def _encode_piece(self, rust: Tokenizer, text: str, continues: bool) -> Iterator[tuple[int, tuple[int, int]]]:
        """Ids and offsets of a text; where it continues another, without a dummy prefix before its first word."""
        piece = rust.encode(text, add_special_tokens=False)
        tokens = list(zip(piece.ids, piece.offsets, strict=True))
        if not continues:
            yield from tokens
            return
        if id(rust) not in self._continuations:
            self._continuations[id(rust)] = _without_prefix(rust)
        continued = self._continuations[id(rust)].encode(text, add_special_tokens=False)
        # Up to the first added token; after one of those the tokenizer may put its prefix again.
        unprefixed = zip(continued.ids, continued.offsets, strict=True)
        yield from takewhile(lambda token: token[0] not in self._added_ids, unprefixed)
        yield from dropwhile(lambda token: token[0] not in self._added_ids, tokens)

    # ------------------------------------------------------------------------------------------- many conversations

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded | FormatError]:
        """Many conversations at once; an error stands in the place of a row that cannot be encoded exactly."""
        return self.encode_rendered(self.render_batch(conversations))

    def shape(self, conversation: Conversation) -> Shape | None:
        """What a template may branch on; None if the turns may not be read off the ids."""
        if self.native:
            return None
        try:
            return self._reader.shape(conversation._replace(messages=self._fit(conversation.messages)))
        except FormatError:
            return None  # encoding says so

    def rewrites_history(self, conversation: Conversation, shape: Shape | None) -> bool:
        """Whether an answer, or what precedes it, is written otherwise once more messages follow."""
        if self.native:
            return False  # its answers are encoded alike; the next role's token ends one, or </s>
        try:
            messages, tools = self._fit(conversation.messages), conversation.tools
        except FormatError:
            return False  # encoding says so
        if shape is None and self.control.find(messages, tools):
            messages, tools, _ = self.control.split_spelled(messages, tools)
        return self._history.is_rewritten(Conversation(messages, tools), shape)

    def leaves_out_reasoning(self, conversation: Conversation) -> bool:
        """Whether an answer has reasoning that the template does not write even where it is the last."""
        return not self.native and leaves_out(self._not_written, conversation)

    def render_batch(
        self,
        conversations: Sequence[Conversation],
        shapes: Sequence[Shape | None] | None = None,
        last_only: Set[int] = frozenset(),
    ) -> Rendered:
        """The first half of `encode_batch`: Python's work, for one thread while another runs the second half.

        Args:
            shapes: of the conversations, where they are known already.
            last_only: indexes of those whose last answer alone carries loss; of their turns only the last is of use.
        """
        rendered = Rendered(conversations, [], [], [], [], last_only)
        shapes = list(map(self.shape, conversations)) if shapes is None else shapes
        for i, (conversation, shape) in enumerate(zip(conversations, shapes, strict=True)):
            if shape is None:
                rendered.careful.append(i)
                continue
            messages, tools, _ = conversation
            try:
                rendered.texts.append(self.render(messages, tools) + self._closing(messages[-1]))
            except FormatError:
                rendered.careful.append(i)  # which says so again
                continue
            rendered.quick.append(i)
            rendered.shapes.append(shape)
        return rendered

    def _closing(self, last: Message) -> str:
        """What ends the last answer where the template ends a turn with the next role's marker only."""
        return self._closings.get("tool_calls" in last, "") if last["role"] == "assistant" else ""

    def encode_rendered(self, rendered: Rendered) -> list[Encoded | FormatError]:
        """The second half of `encode_batch`: most of it in the tokenizer's Rust side, which leaves Python to others."""
        results: dict[int, Encoded | FormatError] = {}
        for i in rendered.careful:
            results[i] = self._encode_or_error(rendered, i)
        if texts := rendered.texts:
            # What all rows begin with (a system prompt) is encoded once, up to a control token: there tokens part.
            common = os.path.commonprefix(texts)
            cut = max((m.start() for m in self.control.splitting_pattern.finditer(common)), default=0)
            head = self._rust.encode(texts[0][:cut], add_special_tokens=False).ids if cut else []
            encodings = self._rust.encode_batch_fast([text[cut:] for text in texts], add_special_tokens=False)
            self._read_turns(rendered, [np.array(head + e.ids, dtype=np.int32) for e in encodings], results)
        return [results[i] for i in range(len(rendered.conversations))]

    def _encode_or_error(self, rendered: Rendered, i: int) -> Encoded | FormatError:
        messages, tools, _ = rendered.conversations[i]
        try:
            return self.encode(messages, tools, last_only=i in rendered.last_only)
        except FormatError as error:
            return error

    def _read_turns(self, rendered: Rendered, ids: list[np.ndarray], results: dict[int, Encoded | FormatError]) -> None:
        """Fills the quick rows: turns read off the ids, or by `encode` where reading them off is not proven."""
        reader, conversations = self._reader, rendered.conversations
        if not reader.knows_header:
            first = next((i for i in rendered.quick if conversations[i].messages[0]["role"] != "assistant"), None)
            if first is not None and isinstance(self._encode_or_error(rendered, first), Encoded):  # for its stop ids
                reader.learn_header(conversations[first])
        unwritten = reader.unwritten_prompt
        notes = (PROMPT_PARTED,) if unwritten else ()
        rows = zip(rendered.quick, rendered.shapes, rendered.texts, ids, reader.read(ids, self.stop_ids), strict=True)
        reasoning = self._reasoning
        for i, shape, text, row_ids, (turns, all_sound, last_sound) in rows:
            sound = last_sound if i in rendered.last_only else all_sound
            # With an unwritten prompt an answer may begin with what its prompt holds beyond the header.
            sound = sound and not (unwritten and reader.whole_header in text)
            sound = sound and len(turns) == shape.count("assistant") > 0
            if i in rendered.last_only:  # careful encoding may give other ids then, so it is proven apart
                shape, turns = (*shape, "last only"), turns[-1:]
            if reasoning is not None:
                sound = sound and reasoning.may_read(conversations[i], text)
                turns = [reasoning.after_block(row_ids.tolist(), turn) for turn in turns] if sound else turns
            if sound and reader.is_proven(shape):
                results[i] = Encoded(row_ids, turns, notes)
                continue
            results[i] = exact = self._encode_or_error(rendered, i)
            if sound and reader.is_proven(shape) is None and isinstance(exact, Encoded):
                same_ids = list(exact.input_ids) == row_ids.tolist() and exact.notes == notes
                reader.record(shape, same_ids and list(exact.turns) == turns)


def _token_at(encoding: Encoding, char: int, end: int) -> int:
    """The first token of the character, or of the next one that is not normalised away."""
    found = (encoding.char_to_token(i) for i in range(char, end))
    return next(token for token in found if token is not None)


def _without_post_processor(tokenizer: Tokenizer) -> Tokenizer:
    """A copy whose offsets are not trimmed, and that neither pads nor cuts."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.post_processor = None
    copy.no_padding()
    copy.no_truncation()
    copy.encode_special_tokens = False
    return copy


def _without_prefix(tokenizer: Tokenizer) -> Tokenizer:
    """A copy for text that goes on where other text ends: SentencePiece's dummy prefix is not put before it."""
    state = json.loads(tokenizer.to_str())

    def strip(node: Any) -> Any:
        if isinstance(node, list):
            return [strip(item) for item in node if not (isinstance(item, dict) and item.get("type") == "Prepend")]
        if isinstance(node, dict):
            node = {key: strip(item) for key, item in node.items()}
            if node.get("type") == "Metaspace":
                node["prepend_scheme"] = "never"
            if node.get("type") == "ByteLevel":
                node["add_prefix_space"] = False
        return node

    for part in ("normalizer", "pre_tokenizer"):
        section = state.get(part)
        state[part] = None if isinstance(section, dict) and section.get("type") == "Prepend" else strip(section)
    return Tokenizer.from_str(json.dumps(state))
