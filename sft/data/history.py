"""Does a template write an answer as history otherwise than as the last message?  And on what does that depend?

Qwen3 puts an empty `<think>` block into the last answer only, and drops the reasoning of earlier ones:

    as the last message   ...<|im_start|>assistant⏎<think>⏎⏎</think>⏎⏎Aye.<|im_end|>⏎
    once more follows     ...<|im_start|>assistant⏎Aye.<|im_end|>⏎<|im_start|>user⏎...
"""

import os.path
import re
from collections.abc import Iterable

from jinja2 import nodes

from sft.data.answer_spans import locate_turns
from sft.data.chat_template import ChatTemplate
from sft.data.conversation import Conversation, Message, assistant_turns
from sft.data.turn_reader import Shape
from sft.errors import FormatError

STRIPPING = {"strip", "lstrip", "rstrip", "trim"}


class History:
    """What a template makes of earlier answers. Where roles alone decide, it is asked once for a shape."""

    def __init__(self, template: ChatTemplate, control: re.Pattern[str]):
        self._render, self._control = template.render, control
        markers = sorted(content_markers(template.parsed))
        self._prefix, self._markers = (
            os.path.commonprefix(markers),
            re.compile("|".join(map(re.escape, markers)) or "(?!)"),
        )
        used = {node.name for tree in template.parsed for node in tree.find_all(nodes.Filter)}
        used |= {node.attr for tree in template.parsed for node in tree.find_all(nodes.Getattr)}
        self._strips = bool(used & STRIPPING)
        self._reads_content = bool(markers) or self._strips
        self._known: dict[Shape, bool] = {}
        self._tails: dict[bool, str] = {}

    def is_rewritten(self, conversation: Conversation, shape: Shape | None) -> bool:
        """Whether the text up to the end of an answer is another one when the conversation ends there.

        False too for a conversation that the template refuses; encoding it says so.
        """
        messages = conversation.messages
        known = None if shape is None else self._known.get(shape)
        if known is not None and not (self._reads_content and self._content_decides(messages)):
            return known
        found = self._ask(conversation)
        if shape is not None and not self._content_decides(messages):
            self._known[shape] = found
        return found

    def _ask(self, conversation: Conversation) -> bool:
        messages, tools, _ = conversation
        try:
            text = self._render(messages, tools)
            for k in assistant_turns(messages[:-1]):
                beginning = conversation._replace(messages=messages[: k + 1])
                ended = self._render(messages[: k + 1], tools)
                if not text.startswith(ended[: len(ended) - len(self._tail(beginning, ended))]):
                    return True
        except FormatError:
            pass
        return False

    def _tail(self, conversation: Conversation, text: str) -> str:
        """What the template writes after the stop token of a last answer; located once for plain answers and calls."""
        calls = bool(conversation.messages[-1].get("tool_calls"))
        if calls not in self._tails or not text.endswith(self._tails[calls]):
            located = locate_turns(self._render, *conversation[:2], self._control, [len(conversation.messages) - 1])
            self._tails[calls] = text[located.spans[-1][1] :]
        return self._tails[calls]

    def _content_decides(self, messages: list[Message]) -> bool:
        """Whether the messages hold what the template may look for, or other keys than role and content."""
        for message in messages:
            content = message.get("content")
            if len(message) > 2 or not content or (self._prefix in content and self._markers.search(content)):
                return True
            if self._strips and (content[0].isspace() or content[-1].isspace()):
                return True
        return False


def content_markers(templates: Iterable[nodes.Template]) -> set[str]:
    """The texts that templates look for in content, e.g. "</think>" in `'</think>' in content`.

    These are their literals in comparisons and in arguments of text methods and macros, and those with a name. Plain
    words are left out: they are roles and keys.
    """
    found: list[nodes.Node] = []
    for template in templates:
        for comparison in template.find_all(nodes.Compare):
            found += [comparison.expr, *(operand.expr for operand in comparison.ops)]
        for call in template.find_all(nodes.Call):
            found += call.args
        for filtered in template.find_all(nodes.Filter):
            found += filtered.args
        found += [assignment.node for assignment in template.find_all(nodes.Assign)]
    texts = {node.value.strip() for node in found if isinstance(node, nodes.Const) and isinstance(node.value, str)}
    return {text for text in texts if len(text) > 2 and re.search(r"[^\w\s]", text)}
