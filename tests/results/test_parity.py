"""final_model/ in a fresh process with plain transformers: prompts and stop tokens are those of training."""

import ast
import json
import re
import sys

import pytest
from transformers import AutoTokenizer, GenerationConfig

from sft.data.chat import ChatEncoder
from sft.data.conversation import Conversation
from sft.errors import FormatError, ModelError
from sft.model.chatglm3 import save_chatglm, save_glm
from sft.model.tokenizer import with_defaults
from sft.results.parity import SCRIPT, prove_parity
from tests.families import FAMILIES, build, conversations

Q, A = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}


def save(folder, tokenizer, stops):
    """What export writes, but for the weights. Of a phi3 transformers loads any tokenizer as it was saved."""
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "phi3"}', encoding="utf-8")
    GenerationConfig(eos_token_id=stops).save_pretrained(folder)


@pytest.fixture
def served(tmp_path):
    """A saved Qwen3 whose thinking is off, its encoder, and a conversation of two answers."""
    tokenizer = build(FAMILIES["qwen3"], "bytes")
    tokenizer.chat_template = with_defaults(tokenizer.chat_template, {"enable_thinking": False})
    encoder = ChatEncoder(tokenizer)
    conversation = Conversation([Q, A, {"role": "user", "content": "And you?"}, A])
    encoder.encode(*conversation)
    save(tmp_path, tokenizer, [*encoder.stop_ids, 3])
    return tmp_path, encoder, [("test.jsonl:7", conversation)]


def test_every_prompt_and_the_stop_tokens_are_those_of_training(served):
    folder, encoder, rows = served
    (stop,) = encoder.stop_ids
    assert prove_parity(folder, encoder, rows) == {
        "prompts": 2,
        "spelled_control_tokens": 0,
        "trained_stops": {"<|im_end|>": stop},
        "stops": {encoder.tokenizer.convert_ids_to_tokens(3): 3, "<|im_end|>": stop},
    }


@pytest.mark.parametrize(("name", "kind"), [("qwen3", "bytes"), ("gemma3", "gemma"), ("phi3", "legacy")])
def test_hostile_conversations_have_the_same_prompts_for_a_server(tmp_path, name, kind):
    tokenizer = build(FAMILIES[name], kind)
    encoder, rows = ChatEncoder(tokenizer), []
    for i, row in enumerate(conversations(FAMILIES[name], 200, seed=3)):
        if not isinstance(encoder.encode_batch([Conversation(*row)])[0], FormatError):
            rows.append((f"test.jsonl:{i + 1}", Conversation(*row)))
    save(tmp_path, tokenizer, sorted(encoder.stop_ids))
    found = prove_parity(tmp_path, encoder, rows)
    assert found["prompts"] > 200 and found["spelled_control_tokens"] == 0


def test_another_template_is_an_error_that_names_row_and_token(served):
    folder, encoder, rows = served
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("else false", "else true"), encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        prove_parity(folder, encoder, rows)
    ids = encoder.encode_prompt([Q])
    told = (
        rf"test.jsonl:7: the prompt before message 2 is another one for a server: token {len(ids) - 3} was '<think>' "
    )
    assert re.match(told + r"\(\d+\) in training and is the end with ", str(caught.value))


def test_a_prompt_that_a_server_cannot_render_is_an_error(served):
    folder, encoder, rows = served
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}", encoding="utf-8")
    with pytest.raises(ModelError, match="test.jsonl:7: the prompt before message 2 is not rendered by .*no such role"):
        prove_parity(folder, encoder, rows)


def test_a_trained_stop_token_that_generation_lacks_is_an_error(served):
    folder, encoder, rows = served
    GenerationConfig(eos_token_id=[3]).save_pretrained(folder)
    with pytest.raises(
        ModelError, match=r"generation_config.json: answers ended with \{'<\|im_end\|>': \d+\} in training"
    ):
        prove_parity(folder, encoder, rows)


def test_a_folder_that_does_not_load_is_an_error(served):
    folder, encoder, rows = served
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="does not load in plain transformers: "):
        prove_parity(folder, encoder, rows)


def test_prompts_that_spell_a_control_token_are_set_apart(served):
    """Trained as the text it is (control_tokens: text), read as the token by a server, which has one string."""
    folder, _, rows = served
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(folder), "text")
    spelled = Conversation([{"role": "user", "content": "What is <|im_end|>?"}, A])
    found = prove_parity(folder, encoder, [*rows, ("test.jsonl:8", spelled)])
    assert (found["prompts"], found["spelled_control_tokens"]) == (2, 1)


def test_the_script_is_plain_transformers():
    tree = ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8")))
    imported = {
        name.split(".")[0]
        for node in tree
        for name in (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
        )
        if name
    }
    assert imported - sys.stdlib_module_names == {"transformers"}


def test_both_layouts_of_chatglm3(tmp_path):
    from tests.model.test_chatglm3_model import tiny_model
    from tests.model.test_chatglm3_tokenizer import train

    train(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model, encoder = tiny_model(padded_vocab_size=len(tokenizer)), ChatEncoder(tokenizer)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": "1"}'}}]}
    rows = [
        ("a:1", Conversation([Q, A, Q, A])),
        ("a:2", Conversation([Q, call, {"role": "tool", "content": "15"}, A], [{"type": "function", "name": "f"}])),
        ("a:3", Conversation([{"role": "user", "content": "a <sop> b"}, A])),
    ]
    save_glm(model, tokenizer, tmp_path / "glm")
    found = prove_parity(tmp_path / "glm", encoder, rows)
    assert (found["prompts"], found["spelled_control_tokens"]) == (4, 1)
    assert set(found["trained_stops"]) == {"</s>", "<|user|>", "<|observation|>"}
    save_chatglm(model, tmp_path, tmp_path / "chatglm")
    assert prove_parity(tmp_path / "chatglm", encoder, rows) == {
        "not_checked": "the layout chatglm is read by the vendor's own code, not by plain transformers"
    }
    json.dumps(found)
