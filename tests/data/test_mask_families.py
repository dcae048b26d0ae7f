"""0 differences between sft/data/chat.py and the oracle of tests/families.py: 2,000 hostile conversations a family."""

import os
import random
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft.data.chat import ChatEncoder
from sft.data.conversation import Conversation
from tests.families import FAMILIES, build, conversations, difference, expect, hostile_conversations

COUNT = 2000
CASES = [(name, kind) for name, f in FAMILIES.items() for kind in ("bytes", f.sentencepiece) if kind]


def batches(rows, rng):
    """Uneven batches, some of one row."""
    while rows:
        size = rng.choice((1, 3, 50, 400))
        yield rows[:size]
        rows = rows[size:]


def check(family, kind, tokenizer, count):
    """Compares both paths with the oracle, row by row. Returns (merged rows, rows that encode_batch read off)."""
    rows = list(conversations(family, count))
    expected = list(expect(family, kind, tokenizer, rows))
    encoder = ChatEncoder(tokenizer)
    alone = [encoder.encode(*row) for row in rows]
    careful = 0
    encode = encoder.encode

    def counted(messages, tools=None):
        nonlocal careful
        careful += 1
        return encode(messages, tools)

    encoder.encode = counted
    together = [
        result
        for batch in batches(rows, random.Random(0))
        for result in encoder.encode_batch([Conversation(*row) for row in batch])
    ]
    for row, want, one, many in zip(rows, expected, alone, together, strict=True):
        assert not (wrong := difference(want, one)), f"encode: {wrong}\n{row}"
        assert not (wrong := difference(want, many)), f"encode_batch: {wrong}\n{row}"
        assert one.notes == many.notes, row
    return sum(want.merged for want in expected), count - careful


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_mask_and_ids_differ_nowhere_from_the_oracle(name, kind, record_property):
    family, count = FAMILIES[name], 500 if name == "cohere2" else COUNT  # its system prompt has 1,100 tokens
    merged, read_off = check(family, kind, build(family, kind), count)
    record_property("merged", merged)
    assert merged < count / 4
    assert read_off > count / 4


def test_real_qwen_tokenizer_differs_nowhere_from_the_oracle(qwen_tokenizer):
    merged, read_off = check(FAMILIES["qwen2_5"], "bytes", qwen_tokenizer, COUNT)
    assert merged < COUNT / 4
    assert read_off > COUNT / 4


@cache
def built(name, kind):
    tokenizer = build(FAMILIES[name], kind)
    return tokenizer, ChatEncoder(tokenizer)


@settings(
    max_examples=int(os.environ.get("MASK_EXAMPLES", "150")),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_hypothesis_finds_no_counter_example(data):
    """A short profile of benchmarks/mask_hypothesis.py."""
    case = data.draw(st.sampled_from(CASES))
    family, (tokenizer, encoder) = FAMILIES[case[0]], built(*case)
    rows = [data.draw(hostile_conversations(family)) for _ in range(2)]
    for row, want in zip(rows, expect(family, case[1], tokenizer, rows), strict=True):
        assert not difference(want, encoder.encode(*row))
        for many in encoder.encode_batch([Conversation(*row)] * 2):
            assert not difference(want, many)
