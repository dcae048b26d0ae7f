"""Where in the text of a chat template each answer begins and ends.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from sft.data.control_tokens import unused_character
from sft.data.conversation import Message, Tools
from sft.errors import FormatError


class Render(Protocol):
    """Messages -> the template's text; `prompt`: with the header of the answer that comes next."""

    def __call__(self, messages: list[Message], tools: Tools | None = None, prompt: bool = False) -> str: ...


# ----------------------------------------------------------------------------------------------------------- locating


class LocatedTurns(NamedTuple):
    """text: the rendered conversation. spans: characters of `text`, one pair a turn: answer and stop token.

    unwritten_prompt: the end of a generation prompt that the rendered turn does not begin with (DeepSeek-R1's
    "<think>\\n"); "" where every turn begins with its whole prompt.
    closing: the end of `text` that the template does not write: GLM-4.5 ends a turn with the next role's marker only,
    so after the last turn the marker that most likely follows is put ("<|user|>"); "" mostly.
    """

    text: str
    spans: list[tuple[int, int]]
    unwritten_prompt: str
    closing: str


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
    render: Render,
    messages: list[Message],
    tools: Tools | None,
    control: re.Pattern[str],
    answers: Sequence[int],
) -> LocatedTurns:
    """Renders a conversation and finds some of its answers, each with its stop token, in the text.

    answers: the indexes of their messages.

    Raises: FormatError: an answer's beginning or end cannot be told.
    """
    text = render(messages, tools)
    mark = unused_character((text, messages, tools))
    spans: list[tuple[int, int]] = []
    unwritten_prompt = closing = ""
    for k in answers:
        question = _Question(render, messages, tools, k, mark, control)
        calls = messages[k].get("tool_calls") or []
        if not all(isinstance(call, dict) for call in calls):
            raise FormatError(f"a tool call of {question.name} is not an object")
        marked, marked_last, marked_whole = _marked_texts(question)
        start, unwritten = _find_start(question, text, marked_last, marked_whole)
        unwritten_prompt = unwritten or unwritten_prompt
        stop, closing = _find_stop(question, text, start, marked, marked_last, marked_whole)
        if spans and start < spans[-1][1]:
            raise FormatError(f"the end of the answer ({question.name}) cannot be told in the chat template's text")
        names = [(call.get("function") or call).get("name", "") for call in calls]
        for name in names:
            if name and text.count(name, start, stop) < names.count(name):
                raise FormatError(f"the chat template does not write the tool calls of {question.name}")
        spans.append((start, stop))
    return LocatedTurns(text + closing, spans, unwritten_prompt, closing)


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
    """The message with a mark where a template may write it: its content, or its first tool call.

    A template may repeat the name of what is called (gpt-oss does before the result), or sort the arguments: a private
    character comes last.
    """
    called = []
    if calls := message.get("tool_calls"):
        function = calls[0].get("function") or calls[0]
        arguments = function.get("arguments") or {}
        more = arguments + mark if isinstance(arguments, str) else {**arguments, mark: 1}
        for changed in ({**function, "name": mark}, {**function, "arguments": more}):
            first = {**calls[0], "function": changed} if "function" in calls[0] else changed
            called.append({**message, "tool_calls": [first, *calls[1:]]})
    content = {**message, "content": mark}
    # What is empty may not be written; what is not written changes nothing.
    yield from [content, *called] if message.get("content") else [*called, content]


def _find_start(question: _Question, text: str, marked_last: str, marked_whole: str) -> tuple[int, str]:
    """Where the answer begins in `text`, and what of its generation prompt is not written there."""
    try:
        return _start_of_marked(question, text, marked_last, marked_whole)
    except FormatError:
        if (start := _start_behind_history(question, text)) is None:
            raise
        return start


def _start_behind_history(question: _Question, text: str) -> tuple[int, str] | None:
    """The same by a mark in the message before: prompt and text begin alike behind it, up to the answer.

    For a history that the template writes otherwise in a prompt than before an answer (gpt-oss drops the reasoning of
    calls before a final answer).
    """
    if not question.k:
        return None
    history = [*question.history[:-1], {**question.history[-1], "content": question.mark}]
    texts = [
        question.render(history, question.tools),
        question.render(history, question.tools, prompt=True),
        question.render([*history, *question.messages[question.k :]], question.tools),
    ]
    if any(marked.count(question.mark) != 1 for marked in texts):
        return None
    end_of_history, prompt, whole = (marked.partition(question.mark)[2] for marked in texts)
    length = common_length(prompt, whole, question.control)
    if not text.endswith(whole) or length < common_length(prompt, end_of_history, question.control):
        return None
    return len(text) - len(whole) + length, prompt[length:]


def _start_of_marked(question: _Question, text: str, marked_last: str, marked_whole: str) -> tuple[int, str]:
    """The same by the mark in the answer."""
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


def _find_stop(
    question: _Question, text: str, start: int, marked: Message, marked_last: str, marked_whole: str
) -> tuple[int, str]:
    """Where the answer ends in `text`, its stop token included, and what must be put behind `text` for that."""
    mark, control = question.mark, question.control
    after_last, after_whole = (t[t.index(mark) + 1 :] for t in (marked_last, marked_whole))
    # A later message may leave no trace in the text (a role that the template does not know).
    after_followed = after_whole if after_whole != after_last else _after_when_followed(question, marked)
    alike = len(os.path.commonprefix([after_last, after_followed]))
    stops = [found for found in control.finditer(after_last) if found.end() <= alike]
    stop = stops[-1] if stops else _other_stop(question, after_last, after_followed)
    if after_whole == after_last and stop.end() > len(after_last):  # the last turn, and nothing ends it
        closing = after_followed[len(after_last) : stop.end()]
        if not text.endswith(after_last) or len(text) <= start:
            raise FormatError(f"the end of the answer ({question.name}) cannot be told in the chat template's text")
        return len(text) + len(closing), closing
    text_after_turn = after_whole[stop.end() :]
    end = len(text) - len(text_after_turn)
    if not text.endswith(text_after_turn) or end <= start:
        raise FormatError(f"the end of the answer ({question.name}) cannot be told in the chat template's text")
    if not text.endswith(stop[0], start, end):
        raise FormatError(f"the chat template ends {question.name} without {stop[0]!r}, its stop token")
    return end, ""


def _other_stop(question: _Question, after_last: str, after_followed: str) -> re.Match[str]:
    """The stop token where the template ends its last turn in another way than those before.

    That of the last turn is then the only control token behind it (gpt-oss: `<|return|>`, else `<|end|>`). Where there
    is none, the next role's marker ends a turn, if nothing else stands before it (GLM-4.5).

    after_last, after_followed: what stands behind the answer when it is the last, and when another message follows.
    """
    in_last, in_followed = (list(question.control.finditer(text)) for text in (after_last, after_followed))
    if len(in_last) == 1 and question.k + 1 == len(question.messages):
        return in_last[0]
    if in_last and in_followed:
        raise FormatError(
            f"the chat template writes {in_last[0][0]!r} after {question.name} when it is the last, else "
            f"{in_followed[0][0]!r}, so its stop token cannot be told; set chat.examples: each_answer, or give another "
            "template with chat.template"
        )
    ends_bare = not in_last and (question.messages[question.k].get("tool_calls") or not after_last.strip())
    if ends_bare and in_followed and after_followed.startswith(after_last):
        if not after_followed[len(after_last) : in_followed[0].start()].strip():
            return in_followed[0]
    raise FormatError(
        f"the chat template writes no stop token after the answer ({question.name}), so a model trained "
        "on it would never stop; give one that does with chat.template"
    )


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
    """The length of what two texts begin with alike.

    Where they part, that ends neither inside a control token nor inside a word or a tag of either: a prompt that ends
    with "<think>" and a turn that begins with "</think>" have no "<" in common.
    """
    end = len(os.path.commonprefix([a, b]))
    for text in (a, b):
        for match in control.finditer(text, max(0, end - 128)):
            if match.start() >= end:
                break
            if match.end() > end:
                end = match.start()
    if end < min(len(a), len(b)) and (cut := _BEGUN.search(a, 0, end)):
        if cut[0][0] in "<[" or a[end].isalnum() or b[end].isalnum():
            return max([cut.start(), *(m.end() for m in control.finditer(a, max(0, end - 128), end))])
    return end


_BEGUN = re.compile(r"[<\[]/?\w*\Z|\w+\Z")  # a tag or a word at the end of a text
