"""chat.variables: defaults in the chat template itself, for every rendering here and for a server's."""

import json
from pathlib import Path

import hypothesis.strategies as st
import jinja2
import pytest
import trl
from hypothesis import given, settings
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from sft.errors import RecipeError
from sft.model.tokenizer import load_tokenizer, with_defaults
from sft.recipe import load_recipe
from tests.families import FAMILIES, build

Q, A = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}
TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


def render(template, **given):
    compiled = chat_template_utils._compile_jinja_template(template)
    return compiled.render(messages=[Q, A, Q], bos_token="<s>", eos_token="</s>", **given)


@pytest.fixture
def loaded(tmp_path):
    """The tokenizer of a recipe with these chat.variables."""

    def load(variables, tokenizer=None, template="qwen3"):
        folder = tmp_path / "model"
        (tokenizer or build(FAMILIES[template], "bytes")).save_pretrained(folder)
        (folder / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
        recipe = tmp_path / "x.yaml"
        text = f"model_name_or_path: {folder}\noutput_dir: o\ndataset_path: a.jsonl\nchat:\n  variables: {variables}\n"
        recipe.write_text(text, encoding="utf-8")
        return load_tokenizer(load_recipe(recipe))

    return load


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("value", [False, True, "high"])
def test_a_default_renders_as_the_value_itself_does_and_a_servers_own_value_wins(path, value):
    template = path.read_text(encoding="utf-8")
    variables = {"enable_thinking": value, "reasoning_effort": value}
    try:
        expected = render(template, add_generation_prompt=True, **variables)
    except (jinja2.TemplateError, TypeError):
        pytest.skip("this template refuses the conversation or the value")
    changed = with_defaults(template, variables)
    assert render(changed, add_generation_prompt=True) == expected
    other = with_defaults(template, {"enable_thinking": "another", "reasoning_effort": "another"})
    assert render(other, add_generation_prompt=True, **variables) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(JSON)
def test_any_json_value_arrives_as_it_is(value):
    assert json.loads(render(with_defaults("{{ x | tojson }}", {"x": value}))) == value


@pytest.mark.parametrize(
    "value", ["%}", "{{ y }}", '"', "\\", "\\n", "\n", "\r\n", "\u2028", "🙂", "{#", "-%}", {"a": {"b": {}}}, -1e-7]
)
def test_values_that_look_like_a_template_stay_values(value):
    assert json.loads(render(with_defaults("{{ x | tojson }}", {"x": value}))) == value


@pytest.mark.parametrize(
    "template", ["{{ x }}", "\n{{ x }}", "  {% if x %}1{% endif %}\n", " a\n\n", "\n\n{%- if x %}{% endif %}", "", "a"]
)
def test_the_template_after_the_defaults_renders_as_before(template):
    template += "{% if x %}{% endif %}|"
    assert render(with_defaults(template, {"x": 1, "y": 2})) == render(template, x=1, y=2)


def test_prompts_saved_templates_and_training_use_the_variables(loaded, tmp_path):
    """Without thinking Qwen3's prompt ends with an empty <think> block."""
    tokenizer = loaded("{enable_thinking: false}")
    expected = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.apply_chat_template([Q], add_generation_prompt=True, tokenize=False) == expected
    tokenizer.save_pretrained(tmp_path / "final_model")
    served = AutoTokenizer.from_pretrained(tmp_path / "final_model")
    assert served.apply_chat_template([Q], add_generation_prompt=True, tokenize=False) == expected
    own = served.apply_chat_template([Q], add_generation_prompt=True, tokenize=False, enable_thinking=True)
    assert own == "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"


def test_templates_with_names_all_get_the_defaults(loaded):
    tokenizer = build(FAMILIES["qwen3"], "bytes")
    tokenizer.chat_template = {"default": "{{ x }} {{ messages }}", "tool_use": "{{ tools }} {{ x }}"}
    templates = loaded("{x: 7}", tokenizer).chat_template
    assert {name: render(text).strip("[] ")[:1] for name, text in templates.items()} == {
        "default": "7",
        "tool_use": "7",
    }


def test_a_variable_that_the_template_does_not_read_is_refused(loaded):
    with pytest.raises(RecipeError) as caught:
        loaded("{enable_thinkng: false}")
    said = "x.yaml:5: chat.variables.enable_thinkng: is not read by the chat template, which reads: enable_thinking"
    assert str(caught.value).endswith(said)


def test_chatglm3_has_no_template_to_give_variables_to(tmp_path):
    from tests.model.test_chatglm3_tokenizer import train

    train(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "chatglm"}', encoding="utf-8")
    recipe = tmp_path / "x.yaml"
    text = f"model_name_or_path: {tmp_path}\noutput_dir: o\ndataset_path: a.jsonl\nchat:\n  variables: {{x: 1}}\n"
    recipe.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match="x.yaml:5: chat.variables: this model's conversations are built without"):
        load_tokenizer(load_recipe(recipe))
