"""The tokenizer of a recipe, with a chat template and a pad token."""

import json
import re
from pathlib import Path
from typing import Any

import jinja2.meta
import jinja2.nodes
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

import sft.model.chatglm3  # noqa: F401 - registers ChatGLM3 with the Auto classes
from sft.model.load import load_config
from sft.model.source import first_line, local_or_hub, source_options
from sft.recipe import Recipe
from sft.recipe.rules import RENDERED

MAX_TEMPLATE = 2**18  # characters; gpt-oss's, one of the longest, has 17,000


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer, with the recipe's chat template and variables if it gives such, and with a pad token.

    Raises: RecipeError: it is not there, or it has no chat template, or one that does not read chat.variables.
    """
    config = load_config(recipe)  # which the tokenizer reads too: what is wrong with it is told as such
    options = source_options(recipe)
    source = local_or_hub(recipe.model_name_or_path, recipe, weights=False)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
        if type(tokenizer).__name__ == "MistralCommonBackend":  # has neither offsets nor a chat template
            tokenizer = _convert_tekken(source, options)
    except Exception as error:  # whatever the libraries make of files that are not what they should be
        if Path(source).is_dir() and not any(any(Path(source).glob(name)) for name in ("token*", "vocab*", "*.model")):
            what = f"the folder {source} holds no tokenizer (tokenizer.json); copy that of the model it was made from"
            raise recipe.error("model_name_or_path", what) from None
        raise recipe.error("model_name_or_path", f"its tokenizer does not load: {first_line(error)}") from None
    if not tokenizer.encode("a", add_special_tokens=False):  # what transformers makes of a folder without a vocabulary
        raise recipe.error("model_name_or_path", "its tokenizer knows no text; its tokenizer.json is missing")
    names = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ()
    if wrong := next((name for name in names if not re.fullmatch(r"[\w-]+", name)), None):
        what = f"its tokenizer names a chat template {wrong!r:.60}, which is no name of a file"
        raise recipe.error("model_name_or_path", what)
    if recipe.chat.template is not None:
        tokenizer.chat_template = _read_template(recipe, recipe.chat.template)
    elif recipe.chat.response_template is not None:
        if tokenizer.chat_template:
            raise recipe.error(
                "chat.response_template",
                "this tokenizer has a chat template already; remove the key, or set chat.template",
            )
        tokenizer.chat_template = plain_template(recipe, tokenizer)
    elif not tokenizer.chat_template and not hasattr(tokenizer, "encode_conversation"):
        raise recipe.error(
            "model_name_or_path",
            "its tokenizer has no chat template; give one with chat.template (a .jinja file), or "
            "chat.instruction_template and chat.response_template",
        )
    if recipe.chat.variables:
        _set_defaults(recipe, tokenizer)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if tokenizer.pad_token_id is None or (vocabulary is not None and tokenizer.pad_token_id >= vocabulary):
        tokenizer.pad_token = tokenizer.eos_token  # only fills: labels and attention never look at it
    tokenizer.padding_side = "right"
    return tokenizer


def _read_template(recipe: Recipe, name: str) -> str:
    """Raises: RecipeError: there is no such file, or none of text, or an empty or a huge one."""
    try:
        with open(name, encoding="utf-8-sig") as file:
            template = file.read(MAX_TEMPLATE + 1)
    except UnicodeDecodeError:
        raise recipe.error("chat.template", f"{name} is not UTF-8; give a .jinja file, saved as UTF-8") from None
    except FileNotFoundError:
        what = "a template is given as a file, e.g. templates/mine.jinja; without the key the model's own is used"
        raise recipe.error("chat.template", f"there is no file {name}; {what}") from None
    except OSError as error:
        raise recipe.error("chat.template", f"{name} cannot be read: {error.strerror}") from None
    if not template.strip():
        raise recipe.error("chat.template", f"{name} is empty; give the .jinja file of a chat template")
    if len(template) > MAX_TEMPLATE:
        raise recipe.error("chat.template", f"{name} has more than {MAX_TEMPLATE:,} characters; no chat template has")
    return template


def _convert_tekken(source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """A `tekken.json` as a fast tokenizer, with the folder's chat template, or mistral-common's.

    Its ids are those of mistral-common, which also drops spaces at the end of an answer (docs/families.md).
    """
    from transformers.integrations.mistral import tokenizer as mistral  # needs mistral-common

    _, path = mistral.resolve_mistral_format(source, **{k: v for k, v in options.items() if k != "trust_remote_code"})
    return mistral.convert_tekken_tokenizer(str(path))


def plain_template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template for a model without one, from the recipe's instruction and response templates.

    "### Human:" and "### Assistant:", each with a line break after it, give for one exchange:
    ### Human:\\nHi.\\n### Assistant:\\nHello.</s>\\n
    """

    def text(value: str | list[int] | None) -> str:
        return json.dumps(value if isinstance(value, str) else tokenizer.decode(value or []), ensure_ascii=False)

    human, answer = text(recipe.chat.instruction_template), text(recipe.chat.response_template)
    return (
        "{% for message in messages %}{% if message.role == 'assistant' %}"
        f"{{{{ {answer} + message.content + eos_token + '\\n' }}}}"
        "{% elif message.role == 'system' %}{{ message.content + '\\n' }}"
        f"{{% else %}}{{{{ {human} + message.content + '\\n' }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {answer} }}}}{{% endif %}}"
    )


def _set_defaults(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes chat.variables the defaults of the chat template itself: of each rendering here, and of a server's.

    Raises: RecipeError: there is no template, or it reads no such variable.
    """
    if hasattr(tokenizer, "encode_conversation"):
        raise recipe.error("chat.variables", "this model's conversations are built without a template; take them out")
    templates = tokenizer.chat_template  # one, or several by name
    sources = list(templates.values()) if isinstance(templates, dict) else [templates]
    try:
        read, assigned = (set().union(*names) for names in zip(*map(_variables_of, sources), strict=True))
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        raise recipe.error("chat.variables", f"the chat template is no Jinja template: {first_line(error)}") from None
    for name in recipe.chat.variables:
        if name not in read:
            known = ", ".join(sorted(read - assigned - {*RENDERED, *tokenizer.special_tokens_map})[:8]) or "none"
            raise recipe.error(f"chat.variables.{name}", f"is not read by the chat template, which reads: {known}")
    if isinstance(templates, dict):
        templates = {name: with_defaults(source, recipe.chat.variables) for name, source in templates.items()}
    else:
        templates = with_defaults(templates, recipe.chat.variables)
    tokenizer.chat_template = templates


def _variables_of(source: str) -> tuple[set[str], set[str]]:
    """The variables that a template may read from outside, and those that it sets; a name may be both."""
    environment = chat_template_utils._compile_jinja_template("").environment  # pinned: transformers
    tree = environment.parse(source)
    assigned = {name.name for name in tree.find_all(jinja2.nodes.Name) if name.ctx == "store"}
    return jinja2.meta.find_undeclared_variables(tree), assigned


def with_defaults(template: str, variables: dict[str, Any]) -> str:
    r"""The template with values for variables that a rendering does not give.

    >>> with_defaults("{{ x }}", {"x": [1, None]})
    '{%- set x = x if x is defined else [1, none] -%}\n{{ x }}'
    """
    lines = [
        f"{{%- set {name} = {name} if {name} is defined else {_literal(value)} -%}}\n"
        for name, value in variables.items()
    ]
    head = "".join(lines)
    if head and template[:1].isspace():  # a `-` would take that too; trim_blocks takes the line break alone
        head = head.removesuffix("-%}\n") + "%}\n"
    return head + template


def _literal(value: Any) -> str:
    """A JSON value as Jinja spells it, which is JSON but for null."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
