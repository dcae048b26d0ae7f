"""A chat template: messages -> text, and where in that text each answer begins and ends.

An assistant turn begins after its *header* (what `add_generation_prompt` renders at that point) and ends with its
*stop token* (the last control token that the template writes between this answer and whatever comes next).
`locate_turns` finds both by rendering a conversation again with one thing changed: the history alone with a
generation prompt, the same turn with a mark for its content (or its tool call's name, where a template leaves the
content out), the same turn followed by something else. It assumes nothing about the text of a template and refuses
what it cannot tell. An example, with ■ for the mark and ⏎ for a line break:

    text              <|im_start|>user⏎Hi.<|im_end|>⏎<|im_start|>assistant⏎Aye.<|im_end|>⏎
    marked_last       <|im_start|>user⏎Hi.<|im_end|>⏎<|im_start|>assistant⏎■<|im_end|>⏎
    prompt            <|im_start|>user⏎Hi.<|im_end|>⏎<|im_start|>assistant⏎       all of it begins marked_last
                                                                           ^ so the answer begins here
    after_last                                                              <|im_end|>⏎
    after_followed                                                          <|im_end|>⏎<|im_start|>user⏎x<|im_end|>⏎
                      the last control token in what these two begin with alike is the stop token: <|im_end|>
    span                                                                Aye.<|im_end|>
"""

import os.path
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jinja2
from jinja2.runtime import LoopContext
from jinja2.utils import Namespace
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from sft.data.control_tokens import unused_character
from sft.data.conversation import Message, Tools, assistant_turns
from sft.errors import FormatError, ModelError


class Render(Protocol):
    """Messages -> the template's text; `prompt`: with the header of the answer that comes next."""

    def __call__(self, messages: list[Message], tools: Tools | None = None, prompt: bool = False) -> str: ...


# ---------------------------------------------------------------------------------------------------------- rendering


class ChatTemplate:
    """The chat template of a tokenizer, compiled once.

    Raises: ModelError: it has none, or none without a name.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template; give one with chat.template (a .jinja file), or "
                "chat.instruction_template and chat.response_template"
            )
        try:
            sources = [tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[])]  # a model may have two
        except ValueError as error:
            raise ModelError(f"the tokenizer's chat templates: {error}") from None
        self._compiled, self._compiled_with_tools = map(_compile, sources)
        self.parsed = [self._compiled.environment.parse(source) for source in sources]
        self._variables = {"documents": None, **tokenizer.special_tokens_map}

    def render(self, messages: list[Message], tools: Tools | None = None, prompt: bool = False) -> str:
        """The template's own text, as `apply_chat_template` gives it.

        Raises: FormatError: the template refuses the conversation.
        """
        # As apply_chat_template does: keys that are None are dropped; reasoning goes by each of its names.
        plain = messages
        if any(len(m) != 2 or m.get("content") is None for m in messages):  # else they are role and content alone
            plain = [{key: value for key, value in m.items() if value is not None} for m in messages]
            plain = chat_template_utils._alias_reasoning_fields(plain)  # pinned: transformers
        try:
            template = self._compiled if tools is None else self._compiled_with_tools
            # What `template.render` does, which copies the globals twice: a third of its time for a short dialogue.
            variables = {**template.globals, **self._variables}
            variables |= {"messages": plain, "tools": tools, "add_generation_prompt": prompt}
            return "".join(template.root_render_func(template.new_context(variables, shared=True)))
        except (jinja2.TemplateError, TypeError, AttributeError, ValueError, LookupError) as error:
            raise FormatError(f"the chat template refuses this conversation: {error}") from None


def _compile(source: str) -> jinja2.Template:
    """The template as transformers compiles it, with a shorter way to `message.role` and `loop.last`.

    Jinja tries a dict's attributes before its items, at the price of an exception for each item, and its sandbox looks
    at each public attribute of Jinja's own objects, which are all safe.
    """
    # Private, but the only way to render 15,000 conversations a second.  pinned: transformers
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


# ----------------------------------------------------------------------------------------------------------- locating


class LocatedTurns(NamedTuple):
    """text: the rendered conversation. spans: characters of `text`, one pair a turn: answer and stop token.

    unwritten_prompt: the end of a generation prompt that the rendered turn does not begin with (DeepSeek-R1's
    "<think>\\n"); "" where every turn begins with its whole prompt.
    """

    text: str
    spans: list[tuple[int, int]]
    unwritten_prompt: str


@dataclass(frozen=True)
class _Question:
    """Where does message `k` begin and end?  mark: a character that stands nowhere in the conversation."""

    render: Render
    messages: list[Message]
    tools: Tools | None
    k: int
    mark: str
    control: re.Pattern[str]

    @property
    def history(self) -> list[Message]:
        return self.messages[: self.k]

    @property
    def name(self) -> str:
        return f"message {self.k + 1}"


def locate_turns(
    render: Render, messages: list[Message], tools: Tools | None, control: re.Pattern[str]
) -> LocatedTurns:
    """Renders a conversation and finds each answer with its stop token in the text.

    Raises: FormatError: an answer's beginning or end cannot be told.
    """
    text = render(messages, tools)
    mark = unused_character((text, messages, tools))
    spans: list[tuple[int, int]] = []
    unwritten_prompt = ""
    for k in assistant_turns(messages):
        question = _Question(render, messages, tools, k, mark, control)
        calls = messages[k].get("tool_calls") or []
        if not all(isinstance(call, dict) for call in calls):
            raise FormatError(f"a tool call of {question.name} is not an object")
        marked, marked_last, marked_whole = _marked_texts(question)
        start, unwritten = _find_start(question, text, marked_last, marked_whole)
        unwritten_prompt = unwritten or unwritten_prompt
        stop = _find_stop(question, text, start, marked, marked_last, marked_whole)
        if spans and start < spans[-1][1]:
            raise FormatError(f"the end of the answer ({question.name}) cannot be told in the chat template's text")
        for call in calls:
            if (call.get("function") or call).get("name", "") not in text[start:stop]:
                raise FormatError(f"the chat template does not write the tool calls of {question.name}")
        spans.append((start, stop))
    return LocatedTurns(text, spans, unwritten_prompt)


def _marked_texts(question: _Question) -> tuple[Message, str, str]:
    """The answer with a mark in it; the text with it as the last message; and the text with it in its place."""
    messages, tools, k, mark = question.messages, question.tools, question.k, question.mark
    for marked in _marked(messages[k], mark):
        marked_last = question.render([*messages[:k], marked], tools)
        marked_whole = marked_last
        if k + 1 < len(messages):
            marked_whole = question.render([*messages[:k], marked, *messages[k + 1 :]], tools)
        if marked_last.count(mark) == marked_whole.count(mark) == 1:
            return marked, marked_last, marked_whole
    raise FormatError(f"the chat template does not write the content of {question.name} exactly once")


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


def _find_start(question: _Question, text: str, marked_last: str, marked_whole: str) -> tuple[int, str]:
    """Where the answer begins in `text`, and what of its generation prompt is not written there."""
    before, unwritten = _header(question, marked_last)
    start = len(before)
    if not marked_whole.startswith(before):
        start, unwritten = _header_end(question, question.history, marked_whole)
    if not text.startswith(marked_whole[:start]):
        raise FormatError(f"the chat template changes what comes before {question.name} with its content")
    if unwritten and text.startswith(unwritten, start):
        return start + len(unwritten), ""  # the answer itself begins as the generation prompt ends
    return start, unwritten


def _header(question: _Question, marked_last: str) -> tuple[str, str]:
    """The text up to where the last, marked turn begins, and what its generation prompt holds beyond that.

    The prompt's own rendering of the history may be another one than that in `marked_last`.
    """
    history = question.history
    if not history:
        # Many templates cannot be asked for a prompt without messages; a question before it does no harm.
        start, unwritten = _header_end(question, [{"role": "user", "content": "x"}], marked_last)
        return marked_last[:start], unwritten
    prompt = question.render(history, question.tools, prompt=True)
    end = common_length(prompt, marked_last, question.control)
    if end == len(prompt):
        return prompt, ""
    begin = common_length(prompt, question.render(history, question.tools), question.control)
    if end >= begin:  # they part within the header
        return marked_last[:end], prompt[end:]
    start, unwritten = _header_end(question, history, marked_last)
    return marked_last[:start], unwritten


def _header_end(question: _Question, history: list[Message], marked_text: str) -> tuple[int, str]:
    """Where the marked turn begins in a text that writes the history in another way than its prompt does.

    By its header alone: what the prompt adds to the history. Content cannot hold the control token it begins with.
    Returns: the place, and what the header holds beyond it.
    """
    prompt = question.render(history, question.tools, prompt=True)
    header = prompt[common_length(prompt, question.render(history, question.tools), question.control) :]
    if opener := question.control.match(header):
        mark_at = marked_text.index(question.mark)
        at = marked_text.rfind(opener[0], 0, mark_at)
        end = at + common_length(header, marked_text[at:], question.control)
        if at >= 0 and not question.control.search(marked_text, end, mark_at):
            return end, header[end - at :]
    raise FormatError(f"the header of {question.name} cannot be told in the chat template's text")


def _find_stop(question: _Question, text: str, start: int, marked: Message, marked_last: str, marked_whole: str) -> int:
    """Where the answer ends in `text`, its stop token included."""
    mark, control = question.mark, question.control
    after_last, after_whole = (t[t.index(mark) + 1 :] for t in (marked_last, marked_whole))
    # A later message may leave no trace in the text (a role that the template does not know).
    after_followed = after_whole if after_whole != after_last else _after_when_followed(question, marked)
    alike = len(os.path.commonprefix([after_last, after_followed]))
    stops = [found for found in control.finditer(after_last) if found.end() <= alike]
    if not stops:
        firsts = [found[0] for after in (after_last, after_followed) if (found := control.search(after))]
        if len(firsts) == 2:
            raise FormatError(
                f"the chat template writes {firsts[0]!r} after {question.name} when it is the last, else "
                f"{firsts[1]!r}, so its stop token cannot be told; give another with chat.template"
            )
        raise FormatError(
            f"the chat template writes no stop token after the answer ({question.name}), so a model trained "
            "on it would never stop; give one that does with chat.template"
        )
    text_after_turn = after_whole[stops[-1].end() :]
    stop = len(text) - len(text_after_turn)
    if not text.endswith(text_after_turn) or stop <= start:
        raise FormatError(f"the end of the answer ({question.name}) cannot be told in the chat template's text")
    if not text.endswith(stops[-1][0], start, stop):
        raise FormatError(f"the chat template ends {question.name} without {stops[-1][0]!r}, its stop token")
    return stop


def _after_when_followed(question: _Question, marked: Message) -> str:
    """What the template writes after this answer when another message follows it."""
    following: list[Message] = [{"role": "user", "content": "x"}, {"role": "tool", "name": "f", "content": "x"}]
    if marked.get("tool_calls"):
        following.reverse()
    reason: FormatError | None = None
    for message in following:
        try:
            text = question.render([*question.history, marked, message], question.tools)
        except FormatError as error:
            reason = reason or error
            continue
        return text[text.index(question.mark) + 1 :] if question.mark in text else ""
    raise reason or FormatError("nothing can follow an answer")


def common_length(a: str, b: str, control: re.Pattern[str]) -> int:
    """The length of what two texts begin with alike, never ending inside a control token of either."""
    end = len(os.path.commonprefix([a, b]))
    for text in (a, b):
        for match in control.finditer(text, max(0, end - 128)):
            if match.start() >= end:
                break
            if match.end() > end:
                end = match.start()
    return end


def tokens_around_messages(render: Render, added_tokens: re.Pattern[str]) -> Iterator[str]:
    """Added tokens that the template writes outside the answers of a plain dialogue: its control tokens."""
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    call: Message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    probes: list[list[Message]] = [
        [user, assistant, user, assistant],
        [{"role": "system", "content": "c"}, user, assistant, user, assistant],
        [user, call, {"role": "tool", "name": "f", "content": "d"}, assistant],
    ]
    for messages in probes:
        try:
            text, spans, _ = locate_turns(render, messages, None, added_tokens)
        except FormatError:
            continue  # a template without tools, or without system prompts
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            yield from added_tokens.findall(text, start, stop)
