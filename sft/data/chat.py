"""Messages -> input_ids and the token ranges that carry loss, by one rule for every model family.

The text is the model's own chat template over the whole conversation; its ids are the tokenizer's own. In that text
an assistant turn begins after its *header* (what `add_generation_prompt` renders at that point) and ends with its
*stop token* (the last control token that the template writes between this answer and whatever comes next). All of it
is supervised, also what the template inserts there (Qwen3's empty `<think>` block), since the model must write it.
Nothing else is.

`_locate` finds both ends by rendering a conversation again with one thing changed: the history alone with a
generation prompt, the same turn with a mark for its content (or its tool call's name, where a template leaves the
content out), the same turn followed by something else. It assumes nothing about the text of a template and refuses
what it cannot tell. It is slow (four renderings a turn), so a shape of conversation (its roles, say) is located once,
and from then on its turns are read off the ids: the header's ids to the next stop id. That reading is exact because
neither can come from content (`find_control_tokens`), and it is used only where the number of headers found is the
number of turns.

The one hook: a tokenizer with a method `encode_conversation(messages, tools) -> (input_ids, turns)` builds both
itself, and its prompts with `encode_prompt(messages, tools) -> input_ids` (ChatGLM3; see sft/model/chatglm3).
"""

import json
import os.path
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, dropwhile, takewhile
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jinja2.runtime import LoopContext
from jinja2.utils import Namespace
from tokenizers import Encoding, Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from sft.errors import ControlTokenError, FormatError, ModelError

Message = dict[str, Any]

# A private-use character that the text does not hold stands for an answer, another one splits a spelled control token.
PRIVATE_USE = [chr(code) for code in range(0xE000, 0xE040)]

# Added tokens of some tokenizers that an answer writes itself, also where a template begins an answer with one.
THE_ANSWERS_OWN = {"<think>", "</think>", "<tool_call>", "</tool_call>"}

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
    turns: Sequence[tuple[int, int]]
    notes: tuple[str, ...] = ()


class Conversation(NamedTuple):
    """What a format makes of a row: its messages, and the tools that the template shows to the model."""

    messages: list[Message]
    tools: list[dict] | None = None


class Rendered(NamedTuple):
    """Conversations between the two halves of `encode_batch`.

    careful: the rows that go through `encode`.
    quick, texts, shapes: the others, each with its text and what a template may branch on.
    """

    conversations: Sequence[Conversation]
    careful: list[int]
    quick: list[int]
    texts: list[str]
    shapes: list[tuple]


class _Located(NamedTuple):
    text: str
    spans: list[tuple[int, int]]  # characters of `text`: answer and stop token
    parted: str  # what the generation prompt holds beyond the rendered turn's own header


class ChatEncoder:
    """Encodes conversations with one tokenizer and its chat template.

    Args:
        tokenizer: a fast tokenizer with a chat template, or one with the hook above.
        spelled_control_tokens: what becomes of content that spells a control token: "error" or "text".

    Raises:
        ModelError: the tokenizer has no chat template, or is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spelled_control_tokens: str = "error"):
        self.tokenizer = tokenizer
        self.as_text = spelled_control_tokens == "text"
        self.native = hasattr(tokenizer, "encode_conversation")
        self.stop_ids: set[int] = set()
        if self.native:
            self.stop_ids.update(tokenizer.stop_token_ids)
            return
        if not tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template; give one with chat.template (a .jinja file), or "
                "chat.instruction_template and chat.response_template"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{type(tokenizer).__name__} is not a fast tokenizer: without offsets its answers cannot be told"
            )
        try:
            templates = [tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[])]  # a model may have two
        except ValueError as error:
            raise ModelError(f"the tokenizer's chat templates: {error}") from None
        self._compiled, self._compiled_with_tools = map(_compile, templates)
        self._variables = {"documents": None, **tokenizer.special_tokens_map}
        self._rust = _without_post_processor(tokenizer.backend_tokenizer)
        self._continuations: dict[int, Tokenizer] = {}
        self._text_rust: dict[str, Tokenizer] = {}
        self._added_ids = set(tokenizer.added_tokens_decoder)
        # Special tokens alone at first: the first renderings below tell which others the template writes.
        self.control_tokens = {token for token in tokenizer.all_special_tokens if token and not token.isspace()}
        self.control_tokens |= {
            t.content for t in tokenizer.added_tokens_decoder.values() if t.special and not t.content.isspace()
        }
        self._header_known = False
        self._header_ids: list[int] = []
        self._parted = ""
        self._proven: dict[tuple, bool] = {}
        self._compile_control_pattern()
        self.control_tokens |= set(self._tokens_around_messages())
        self._compile_control_pattern()

    # ------------------------------------------------------------------------------------------------- rendering

    def render(self, messages: list[Message], tools: list[dict] | None = None, prompt: bool = False) -> str:
        """The template's own text, as `apply_chat_template` gives it.

        Raises: FormatError: the template refuses the conversation.
        """
        # As apply_chat_template does: keys that are None are dropped; reasoning goes by each of its names.
        plain = [
            {key: value for key, value in m.items() if value is not None} if None in m.values() else m for m in messages
        ]
        if any("reasoning_content" in m or "reasoning" in m or "thinking" in m for m in plain):
            plain = chat_template_utils._alias_reasoning_fields(plain)  # pinned: transformers 5.23
        try:
            template = self._compiled if tools is None else self._compiled_with_tools
            # What `template.render` does, which copies the globals twice: a third of its time for a short dialogue.
            variables = {**template.globals, **self._variables}
            variables |= {"messages": plain, "tools": tools, "add_generation_prompt": prompt}
            return "".join(template.root_render_func(template.new_context(variables, shared=True)))
        except (jinja2.TemplateError, TypeError, AttributeError, ValueError, LookupError) as error:
            raise FormatError(f"the chat template refuses this conversation: {error}") from None

    def _compile_control_pattern(self) -> None:
        tokens = sorted(self.control_tokens, key=lambda token: (-len(token), token))
        self._control = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        # Nearly every text holds none: a search for what all begin with is several times faster than the pattern.
        self._control_prefix = os.path.commonprefix(tokens)
        added = self.tokenizer.added_tokens_decoder
        self._control_ids = {id for id, t in added.items() if t.content in self.control_tokens}
        self._control_ids.discard(self.tokenizer.unk_token_id)  # any unknown character may become it
        # A token that is matched after normalisation may be spelled by other characters (NFKC: "＜s＞").
        parting = [
            t
            for t in tokens
            if not any(a.lstrip or a.single_word or a.normalized for a in added.values() if a.content == t)
        ]
        self._parting = re.compile("|".join(map(re.escape, parting)) or "(?!)")
        normalized = any(added[id].normalized for id in self._control_ids)
        self._normalizer = self._rust.normalizer if normalized else None

    def find_control_tokens(self, *values: Any) -> list[str]:
        """The control tokens that texts spell, at any depth of lists and dicts, in their order."""
        found: list[str] = []
        for text in _strings(values):
            if self._control_prefix in text:
                found += self._control.findall(text)
            if self._normalizer is not None and self._control.search(normal := self._normalizer.normalize_str(text)):
                found += self._control.findall(normal)[len(self._control.findall(text)) :]
        return found

    def _tokens_around_messages(self) -> Iterator[str]:
        """Added tokens outside the answers of a plain dialogue, beside the tokenizer's special tokens."""
        names = sorted(
            (
                t.content
                for t in self.tokenizer.added_tokens_decoder.values()
                if not t.content.isspace() and t.content not in THE_ANSWERS_OWN
            ),
            key=len,
            reverse=True,
        )
        added = re.compile("|".join(map(re.escape, names)) or "(?!)")
        user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        call: Message = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": _PROBE_CALL}],
        }
        probes: list[list[Message]] = [
            [user, assistant, user, assistant],
            [{"role": "system", "content": "c"}, user, assistant, user, assistant],
            [user, call, {"role": "tool", "name": "f", "content": "d"}, assistant],
        ]
        for messages in probes:
            try:
                located = self._locate(messages, None, added)
            except FormatError:
                continue  # a template without tools, or without system prompts
            edges = [0, *chain.from_iterable(located.spans), len(located.text)]
            for start, stop in zip(edges[::2], edges[1::2], strict=True):
                yield from added.findall(located.text, start, stop)

    # ------------------------------------------------------------------------------------------------- locating

    def _locate(self, messages: list[Message], tools: list[dict] | None, pattern: re.Pattern | None = None) -> _Located:
        """Renders, and finds each answer with its stop token in the text; assumes nothing of the template.

        Raises: FormatError: an answer's beginning or end cannot be told.
        """
        pattern = pattern or self._control
        text = self.render(messages, tools)
        mark = _unused_character((text, messages, tools))
        spans: list[tuple[int, int]] = []
        parted = ""
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            history, calls = messages[:k], message.get("tool_calls") or []
            if not all(isinstance(call, dict) for call in calls):
                raise FormatError(f"a tool call of message {k + 1} is not an object")
            for marked in _marked(message, mark):
                alone = self.render([*history, marked], tools)  # this turn is the last one
                whole = self.render([*history, marked, *messages[k + 1 :]], tools) if k + 1 < len(messages) else alone
                if alone.count(mark) == whole.count(mark) == 1:
                    break
            else:
                raise FormatError(f"the chat template does not write the content of message {k + 1} exactly once")
            before, rest = self._header(history, alone, tools, mark, pattern, k)
            start = len(before)
            if not whole.startswith(before):
                start, rest = self._in_whole(history, whole, tools, mark, pattern, k)
            if not text.startswith(whole[:start]):
                raise FormatError(f"the chat template changes what comes before message {k + 1} with its content")
            if rest and text.startswith(rest, start):
                start += len(rest)  # the answer itself begins as the generation prompt ends
            elif rest:
                parted = rest
            after_alone, after_whole = alone[alone.index(mark) + 1 :], whole[whole.index(mark) + 1 :]
            # A later message may leave no trace in the text (a role that the template does not know).
            other = after_whole if after_whole != after_alone else self._followed(history, marked, tools, mark)
            stops = [
                m.end()
                for m in pattern.finditer(after_alone)
                if m.end() <= len(os.path.commonprefix([after_alone, other]))
            ]
            ends = [found[0] for t in (after_alone, other) if (found := pattern.search(t))]
            if not stops and len(ends) == 2:
                raise FormatError(
                    f"the chat template writes {ends[0]!r} after message {k + 1} when it is the last, else "
                    f"{ends[1]!r}, so its stop token cannot be told; give another with chat.template"
                )
            if not stops:
                raise FormatError(
                    f"the chat template writes no stop token after the answer (message {k + 1}), so a model trained "
                    "on it would never stop; give one that does with chat.template"
                )
            tail = after_whole[stops[-1] :]
            stop = len(text) - len(tail)
            if not text.endswith(tail) or stop <= start or (spans and start < spans[-1][1]):
                raise FormatError(f"the end of the answer (message {k + 1}) cannot be told in the chat template's text")
            stop_token = [m[0] for m in pattern.finditer(after_alone) if m.end() <= stops[-1]][-1]
            if not text.endswith(stop_token, start, stop):
                raise FormatError(f"the chat template ends message {k + 1} without {stop_token!r}, its stop token")
            for call in calls:
                if (call.get("function") or call).get("name", "") not in text[start:stop]:
                    raise FormatError(f"the chat template does not write the tool calls of message {k + 1}")
            spans.append((start, stop))
        return _Located(text, spans, parted)

    def _header(
        self,
        history: list[Message],
        alone: str,
        tools: list[dict] | None,
        mark: str,
        pattern: re.Pattern,
        k: int,
    ) -> tuple[str, str]:
        """The text up to where the marked turn begins, and what its generation prompt holds beyond that.

        `alone` is the history and the marked turn. The prompt's own rendering of the history may be another one.
        """
        if not history:
            # Many templates cannot be asked for a prompt without messages; a question before it does no harm.
            start, rest = self._in_whole([{"role": "user", "content": "x"}], alone, tools, mark, pattern, k)
            return alone[:start], rest
        prompt = self.render(history, tools, prompt=True)
        end = _common(prompt, alone, pattern)
        if end == len(prompt):
            return prompt, ""
        begin = _common(prompt, self.render(history, tools), pattern)
        if end >= begin:  # they part within the header
            return alone[:end], prompt[end:]
        start, rest = self._in_whole(history, alone, tools, mark, pattern, k)
        return alone[:start], rest

    def _in_whole(
        self, history: list[Message], whole: str, tools: list[dict] | None, mark: str, pattern: re.Pattern, k: int
    ) -> tuple[int, str]:
        """Where the marked turn begins in a text that writes the history in another way than its prompt does.

        By its header alone: what the prompt adds to the history. Content cannot hold the control token it begins with.
        Returns: the place, and what the header holds beyond it.
        """
        prompt = self.render(history, tools, prompt=True)
        header = prompt[_common(prompt, self.render(history, tools), pattern) :]
        if opener := pattern.match(header):
            at = whole.rfind(opener[0], 0, whole.index(mark))
            end = at + _common(header, whole[at:], pattern)
            if at >= 0 and not pattern.search(whole, end, whole.index(mark)):
                return end, header[end - at :]
        raise FormatError(f"the header of message {k + 1} cannot be told in the chat template's text")

    def _followed(self, history: list[Message], marked: Message, tools: list[dict] | None, mark: str) -> str:
        """What the template writes after this answer when another message follows it."""
        follow: list[Message] = [{"role": "user", "content": "x"}, {"role": "tool", "name": "f", "content": "x"}]
        if marked.get("tool_calls"):
            follow.reverse()
        reason: FormatError | None = None
        for message in follow:
            try:
                text = self.render([*history, marked, message], tools)
            except FormatError as error:
                reason = reason or error
                continue
            return text[text.index(mark) + 1 :] if mark in text else ""
        raise reason or FormatError("nothing can follow an answer")

    # ------------------------------------------------------------------------------------------------- encoding

    def encode(self, messages: list[Message], tools: list[dict] | None = None) -> Encoded:
        """One conversation, located with care. Raises: FormatError: it cannot be encoded exactly."""
        if self.native:
            input_ids, turns = self.tokenizer.encode_conversation(messages, tools)
            return Encoded(input_ids, turns)
        notes = []
        rust = self._rust
        if spelled := self.find_control_tokens(messages, tools):
            if not self.as_text:
                raise ControlTokenError(f"spells the control token {spelled[0]!r}")
            messages, tools, rust = self._split_spelled(messages, tools)
            notes.append(CONTROL_AS_TEXT)
        located = self._locate(messages, tools)
        text = located.text
        if located.parted:
            notes.append(PROMPT_PARTED)
        encoding = rust.encode(text, add_special_tokens=False)
        ids = encoding.ids
        firsts = [_token_at(encoding, start, len(text)) for start, _ in located.spans]
        cuts = [
            start for (start, _), token in zip(located.spans, firsts, strict=True) if encoding.offsets[token][0] < start
        ]
        if cuts:
            notes.append(HEADER_MERGED)
            ids, begins = [], []
            for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
                for token, offset in self._encode_piece(rust, text[begin:end], goes_on=bool(begin)):
                    ids.append(token)
                    begins.append(offset[0] + begin)
            turns = [tuple(int(i) for i in np.searchsorted(begins, span)) for span in located.spans]
        else:
            lasts = [_token_at(encoding, stop - 1, len(text)) for _, stop in located.spans]
            turns = [(first, last + 1) for first, last in zip(firsts, lasts, strict=True)]
        if sum(map(self._control_ids.__contains__, ids)) != len(self._control.findall(text)):
            raise FormatError("holds text that this tokenizer can only encode as a control token")
        self.stop_ids.update(ids[stop - 1] for _, stop in turns)
        return Encoded(ids, turns, tuple(notes))

    def _encode_piece(self, rust: Tokenizer, text: str, goes_on: bool) -> Iterator[tuple[int, tuple[int, int]]]:
        """Ids and offsets of a text that goes on where another ends: without a dummy prefix before its first word."""
        piece = rust.encode(text, add_special_tokens=False)
        tokens = list(zip(piece.ids, piece.offsets, strict=True))
        if not goes_on:
            yield from tokens
            return
        if id(rust) not in self._continuations:
            self._continuations[id(rust)] = _without_prefix(rust)
        bare = self._continuations[id(rust)].encode(text, add_special_tokens=False)
        # Up to the first added token; after one of those the tokenizer may put its prefix again.
        yield from takewhile(lambda t: t[0] not in self._added_ids, zip(bare.ids, bare.offsets, strict=True))
        yield from dropwhile(lambda t: t[0] not in self._added_ids, tokens)

    def _split_spelled(self, messages: list[Message], tools: list[dict] | None) -> tuple[list, list | None, Tokenizer]:
        """Puts a mark into every spelled control token; gives a tokenizer that drops it once tokens are split off."""
        mark = _unused_character((messages, tools), reversed(PRIVATE_USE))

        def split(value: Any) -> Any:
            if isinstance(value, str):
                while self._control.search(value):  # again, for one token may hold another
                    value = self._control.sub(lambda m: m[0][0] + mark + m[0][1:], value)
                return value
            if isinstance(value, dict):
                return {split(key): split(item) for key, item in value.items()}
            return [split(item) for item in value] if isinstance(value, list) else value

        if mark not in self._text_rust:
            self._text_rust[mark] = _dropping(self._rust, mark)
        return split(messages), split(tools), self._text_rust[mark]

    def encode_prompt(self, messages: list[Message], tools: list[dict] | None = None) -> list[int]:
        """The ids that the model is given when it must write the next assistant turn after `messages`."""
        if self.native:
            return self.tokenizer.encode_prompt(messages, tools)
        rust = self._rust
        if self.find_control_tokens(messages, tools):
            messages, tools, rust = self._split_spelled(messages, tools)
        return list(rust.encode(self.render(messages, tools, prompt=True), add_special_tokens=False).ids)

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded | FormatError]:
        """Many conversations at once; an error stands in the place of a row that cannot be encoded exactly."""
        return self.encode_rendered(self.render_batch(conversations))

    def render_batch(self, conversations: Sequence[Conversation]) -> Rendered:
        """The first half of `encode_batch`: Python's work, for one thread while another runs the second half."""
        if self.native:
            return Rendered(conversations, list(range(len(conversations))), [], [], [])
        rendered = Rendered(conversations, [], [], [], [])
        for i, (messages, tools) in enumerate(conversations):
            shape = self._plain_shape(messages, tools)
            if shape is None:
                rendered.careful.append(i)
                continue
            try:
                rendered.texts.append(self.render(messages, tools))
            except FormatError:
                rendered.careful.append(i)  # which says so again
                continue
            rendered.quick.append(i)
            rendered.shapes.append(shape)
        return rendered

    def encode_rendered(self, rendered: Rendered) -> list[Encoded | FormatError]:
        """The second half of `encode_batch`: most of it in the tokenizer's Rust side, which leaves Python to others."""
        results: list[Any] = [None] * len(rendered.conversations)
        for i in rendered.careful:
            results[i] = self._encode_or_error(*rendered.conversations[i])
        if texts := rendered.texts:
            # What all rows begin with (a system prompt) is encoded once, up to a control token: there tokens part.
            cut = max((m.start() for m in self._parting.finditer(os.path.commonprefix(texts))), default=0)
            head = self._rust.encode(texts[0][:cut], add_special_tokens=False).ids if cut else []
            encodings = self._rust.encode_batch_fast([text[cut:] for text in texts], add_special_tokens=False)
            self._read_off(rendered, [np.array(head + e.ids, dtype=np.int32) for e in encodings], results)
        return results

    def _encode_or_error(self, messages: list[Message], tools: list[dict] | None) -> Encoded | FormatError:
        try:
            return self.encode(messages, tools)
        except FormatError as error:
            return error

    def _plain_shape(self, messages: list[Message], tools: list[dict] | None) -> tuple | None:
        """What a template may branch on: roles, keys, tools, reasoning; None if the turns may not be read off the ids.

        They may not where a text spells a control token, or an answer might join its header.
        """
        shape: list[Any] = [bool(tools)]
        control_prefix = self._control_prefix
        for message in messages:
            role, content = message["role"], message.get("content")
            if role == "assistant" and (not content or content[0].isspace()):
                return None
            shape += role, len(message), "tool_calls" in message, "<think>" in content if content else None
            # The common case apart, for speed: texts without even the first characters of a control token.
            for value in message.values():
                if (type(value) is not str or control_prefix in value) and self.find_control_tokens(value):
                    return None
        if self._normalizer is not None and self.find_control_tokens(messages):
            return None
        return None if tools and self.find_control_tokens(tools) else tuple(shape)

    def _read_off(self, rendered: Rendered, ids: list[np.ndarray], results: list) -> None:
        """Fills the quick rows: answers between header ids and stop ids, or by `encode` where that is not proven."""
        if not self._header_known:
            turns = (rendered.conversations[i] for i in rendered.quick)
            self._learn_header(*next((c for c in turns if c.messages[0]["role"] != "assistant"), Conversation([])))
        lengths = np.array([len(row) for row in ids])
        ends = np.cumsum(lengths)
        begins = ends - lengths
        flat = np.concatenate(ids)
        starts = self._header_ends(flat)
        stop_places = np.flatnonzero(np.isin(flat, list(self.stop_ids))) + 1
        stops = np.append(stop_places, len(flat) + 1)[np.searchsorted(stop_places, starts, side="right")]
        row_of_start = np.searchsorted(ends, starts, side="left")  # a header ends at > its row's begin
        # Each stop belongs to its own turn: it comes before the next turn begins, and before the row ends.
        unsound = (stops > np.append(starts[1:], len(flat) + 1)) | (
            stops > ends[np.minimum(row_of_start, len(ids) - 1)]
        )
        bad_rows = set(row_of_start[unsound].tolist())
        if self._parted:  # an answer may begin with what its prompt holds beyond the header
            bad_rows |= {j for j, text in enumerate(rendered.texts) if self._parted in text}
        bounds = np.searchsorted(row_of_start, np.arange(len(ids) + 1)).tolist()
        row_begins = begins[np.minimum(row_of_start, len(ids) - 1)]
        spans = list(zip((starts - row_begins).tolist(), (stops - row_begins).tolist(), strict=True))
        notes = (PROMPT_PARTED,) if self._parted else ()
        for j, (i, shape) in enumerate(zip(rendered.quick, rendered.shapes, strict=True)):
            turns_of_row = spans[bounds[j] : bounds[j + 1]]
            sound = j not in bad_rows and len(turns_of_row) == shape.count("assistant") > 0
            if sound and self._proven.get(shape):
                results[i] = Encoded(ids[j], turns_of_row, notes)
                continue
            results[i] = exact = self._encode_or_error(*rendered.conversations[i])
            if sound and shape not in self._proven and isinstance(exact, Encoded):
                same_ids = list(exact.input_ids) == ids[j].tolist() and exact.notes == notes
                self._proven[shape] = same_ids and list(exact.turns) == turns_of_row

    def _header_ends(self, flat: np.ndarray) -> np.ndarray:
        """The places just after each occurrence of the header's ids."""
        if not self._header_ids:
            return np.array([], dtype=np.int64)
        width = len(self._header_ids)
        if len(flat) < width:
            return np.array([], dtype=np.int64)
        match = np.ones(len(flat) - width + 1, dtype=bool)
        for offset, token in enumerate(self._header_ids):
            match &= flat[offset : len(flat) - width + 1 + offset] == token
        return np.flatnonzero(match) + width

    def _learn_header(self, messages: list[Message], tools: list[dict] | None) -> None:
        """Takes the ids of the header before the first answer, if it begins with a control token."""
        k = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), 0)
        if not k:
            return  # this row has no answer after something; the next batch tries again
        try:
            bare, prompt = self.render(messages[:k], tools), self.render(messages[:k], tools, prompt=True)
            marked = self.render([*messages[:k], {"role": "assistant", "content": PRIVATE_USE[0]}], tools)
            self.encode(messages, tools)  # for its stop ids
        except FormatError:
            return  # this row says so itself
        end = _common(prompt, marked, self._control)
        header, rest = prompt[_common(prompt, bare, self._control) : end], prompt[end:]
        self._header_known = True
        if self._control.match(header):
            self._header_ids = list(self._rust.encode(header, add_special_tokens=False).ids)
            self._parted = rest


_PROBE_CALL = {"name": "f", "arguments": "{}"}


def _compile(source: str) -> jinja2.Template:
    """The template as transformers compiles it, with a shorter way to `message.role` and `loop.last`.

    Jinja tries a dict's attributes before its items, at the price of an exception for each item, and its sandbox looks
    at each public attribute of Jinja's own objects, which are all safe.
    """
    # Private, but the only way to render 15,000 conversations a second.  pinned: transformers 5.23
    environment = chat_template_utils._compile_jinja_template(source).environment.overlay()
    attributes, slow = frozenset(dir(dict)), environment.getattr
    loop_attributes = frozenset(name for name in dir(LoopContext) if not name.startswith("_"))

    def attribute_or_item(value: Any, name: str) -> Any:
        if type(value) is dict and name not in attributes:
            return value[name] if name in value else environment.undefined(obj=value, name=name)
        if type(value) is LoopContext and name in loop_attributes:
            return getattr(value, name)
        if type(value) is Namespace and not name.startswith("_"):
            return slow(value, name) if (found := getattr(value, name, slow)) is slow else found
        return slow(value, name)

    environment.getattr = attribute_or_item
    return environment.from_string(source)


def _marked(message: Message, mark: str) -> Iterator[Message]:
    """The message with a mark where a template may write it: its content, or its first tool call's name."""
    named = []
    if calls := message.get("tool_calls"):
        first = calls[0]
        function = first.get("function")
        call = {**first, "function": {**function, "name": mark}} if function else {**first, "name": mark}
        named = [{**message, "tool_calls": [call, *calls[1:]]}]
    content = {**message, "content": mark}
    # What is empty may not be written; what is not written changes nothing.
    yield from [content, *named] if message.get("content") else [*named, content]


def _unused_character(texts: Any, choice: Iterable[str] = PRIVATE_USE) -> str:
    """A character that stands nowhere in these texts."""
    used = set().union(*_strings(texts))
    if (mark := next((c for c in choice if c not in used), None)) is None:
        raise FormatError(f"uses every private-use character from {PRIVATE_USE[0]!a} to {PRIVATE_USE[-1]!a}")
    return mark


def _token_at(encoding: Encoding, char: int, end: int) -> int:
    """The first token of the character, or of the next one that is not normalised away."""
    found = (encoding.char_to_token(i) for i in range(char, end))
    return next(token for token in found if token is not None)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _common(a: str, b: str, control: re.Pattern) -> int:
    """The length of what two texts begin with alike, never ending inside a control token of either."""
    end = len(os.path.commonprefix([a, b]))
    for text in (a, b):
        for match in control.finditer(text, max(0, end - 128)):
            if match.start() >= end:
                break
            if match.end() > end:
                end = match.start()
    return end


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
