"""Fixtures that several test files share."""

import pytest

from tests.families import template
from tests.qwen_tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def qwen_tokenizer():
    """The real Qwen2.5 tokenizer; building it takes about three seconds, so there is one a session."""
    return build_tokenizer(template("qwen2_5"))


@pytest.fixture(scope="session")
def tiny_qwen(qwen_tokenizer, tmp_path_factory):
    """A folder with a random two-layer Qwen2 and the real Qwen2.5 tokenizer: real enough for plumbing."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=151643,
        eos_token_id=151645,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("tiny_qwen")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    qwen_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Token rows of the tests go to a folder of their own, not to the user's cache."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
