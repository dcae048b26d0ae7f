"""Mistral's vocabulary, tekken.json, as a fast tokenizer."""

import shutil
from pathlib import Path

import pytest

from sft.data.chat import ChatEncoder
from sft.model.tokenizer import load_tokenizer
from sft.recipe import load_recipe


def test_tekken_tokenizer_gives_the_ids_of_mistral_common(tmp_path):
    """Needs `pip install mistral-common`, which carries a vocabulary; no requirement of ours does."""
    mistral_common = pytest.importorskip("mistral_common")
    vocabulary = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    shutil.copy(vocabulary, tmp_path / "tekken.json")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}', encoding="utf-8")
    train = tmp_path / "train.jsonl"
    train.write_text("{}", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(
        f"{{model_name_or_path: '{tmp_path}', output_dir: out, dataset_path: '{train}'}}", encoding="utf-8"
    )
    chat = ChatEncoder(load_tokenizer(load_recipe(tmp_path / "recipe.yaml")))
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi."}]
    messages += [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Why?"}]
    # <s> [INST] Hi . [/INST] Hello . </s> [INST] Be Ġkind . ĊĊ Why ? [/INST]: mistral-common's own
    expected = [1, 3, 37133, 1046, 4, 22177, 1046, 2, 3, 5934, 5898, 1338, 19429, 1063, 4]
    assert chat.encode_prompt(messages) == expected
    ids, turns, _ = chat.encode([*messages, {"role": "assistant", "content": "So."}])
    assert [chat.tokenizer.decode(ids[start:stop]) for start, stop in turns] == ["Hello.</s>", "So.</s>"]
