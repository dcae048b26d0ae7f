"""Fixtures that several test files share."""

import pytest

from tests.families import template
from tests.qwen_tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def qwen_tokenizer():
    """The real Qwen2.5 tokenizer; building it takes about three seconds, so there is one a session."""
    return build_tokenizer(template("qwen2_5"))
