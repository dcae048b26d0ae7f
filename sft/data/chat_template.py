"""A chat template: messages -> text, as transformers renders it, fast enough to do it for every row."""

from datetime import date
from typing import Any

import jinja2
from jinja2.runtime import LoopContext
from jinja2.utils import Namespace
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from sft.data.conversation import Message, Tools
from sft.data.message_forms import CallForm, call_form, fit_calls, in_parts, wants_parts
from sft.data.template_bounds import bound, compiled, joined, refill
from sft.errors import FormatError, ModelError

MAX_CHARACTERS = 2**18  # of a template; gpt-oss's, one of the longest, has 17,000


class ChatTemplate:
    """The chat template of a tokenizer, compiled once.

    Args: day: what `strftime_now` tells the template, "YYYY-MM-DD"; None: the time of each rendering.
    Raises: ModelError: it has none, or none without a name, or one that is no template, or does not come to an end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, day: str | None = None):
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
        self._variables: dict[str, Any] = {"documents": None, **tokenizer.special_tokens_map}
        if day is not None:
            self._variables["strftime_now"] = date.fromisoformat(day).strftime
        self._in_parts, self._calls = False, CallForm()  # as things come, for the probes
        self._in_parts = wants_parts(self.render)
        self._calls = call_form(self.render)

    def fit(self, messages: list[Message]) -> list[Message]:
        """The messages with what they call in the form that the template wants. Raises: FormatError: they cannot be."""
        return fit_calls(messages, self._calls)

    def served(self, messages: list[Message]) -> list[Message]:
        """The messages as a server gives them to the template: fitted, and in parts where it takes nothing else."""
        fitted = self.fit(messages)
        return list(map(in_parts, fitted)) if self._in_parts else fitted

    def render(self, messages: list[Message], tools: Tools | None = None, prompt: bool = False) -> str:
        """The template's own text, as `apply_chat_template` gives it.

        Raises: FormatError: the template refuses the conversation.
        """
        # As apply_chat_template does: keys that are None are dropped; reasoning goes by each of its names.
        plain = self.served(messages)
        if any(len(m) != 2 or m.get("content") is None for m in plain):  # else they are role and content alone
            plain = [{key: value for key, value in m.items() if value is not None} for m in plain]
            plain = chat_template_utils._alias_reasoning_fields(plain)  # pinned: transformers
        try:
            template = self._compiled if tools is None else self._compiled_with_tools
            # What `template.render` does, which copies the globals twice: a third of its time for a short dialogue.
            variables = {**template.globals, **self._variables}
            variables |= {"messages": plain, "tools": tools, "add_generation_prompt": prompt}
            refill()
            return joined(template.root_render_func(template.new_context(variables, shared=True)))
        except (jinja2.TemplateError, TypeError, AttributeError, ValueError, LookupError, ArithmeticError) as error:
            raise FormatError(f"the chat template refuses this conversation: {error}") from None
        except (RecursionError, MemoryError):
            raise ModelError("the chat template calls itself without an end, or too deep; mend its macros") from None


def shows_day(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes the day on which it is rendered."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return False
    question: list[Message] = [{"role": "user", "content": "x"}]
    first, second = (ChatTemplate(tokenizer, day).render(question) for day in ("2001-01-01", "2012-12-12"))
    return first != second


def _compile(source: str) -> jinja2.Template:
    """The template as transformers compiles it, bounded, with a shorter way to `message.role` and `loop.last`.

    Jinja tries a dict's attributes before its items, at the price of an exception for each item, and its sandbox looks
    at each public attribute of Jinja's own objects, which are all safe.

    Raises: ModelError: it is no template.
    """
    if len(source) > MAX_CHARACTERS:
        raise ModelError(f"the chat template has {len(source):,} characters; one has {MAX_CHARACTERS:,} at most")
    # Private, but the only way to render 15,000 conversations a second.  pinned: transformers
    environment = chat_template_utils._compile_jinja_template("").environment.overlay()
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
    bound(environment)
    try:
        return compiled(environment, source)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"the chat template is no Jinja template: line {error.lineno}: {error.message}") from None
    except (SyntaxError, RecursionError, MemoryError):
        raise ModelError("the chat template is no Jinja template that can be run: it is nested too deep") from None
