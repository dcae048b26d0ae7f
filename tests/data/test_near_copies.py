"""Near copies: test rows that nearly repeat a training row, by MinHash over 5-grams of characters."""

import random
import tracemalloc

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from sft.data import near_copies, signatures
from sft.data.ledger import ledger_table
from sft.data.near_copies import find_near_copies
from sft.data.signatures import NGRAM, SIGNATURE_BYTES, similarity, text_of
from sft.data.token_cache import TokenFile
from sft.data.token_rows import Split, TokenRows
from sft.results.words import notices
from tests.data.conftest import talk, write

QUESTION = "which lamp did the keeper of the lighthouse light when the fog came in from the sea last night"
ANSWER = "the old one with the brass rim for its light goes farthest when the air is thick with salt and water"


def split(made, chosen=None):
    """A split of one file of so many signatures."""
    file = TokenFile("a", range(len(made)), {}, [], made)
    return Split("train", TokenRows([file], [1.0]), np.arange(len(made)) if chosen is None else np.array(chosen))


def jaccard(a, b):
    """By definition, of texts of at least five characters."""
    first, second = ({text[i : i + NGRAM] for i in range(len(text) - NGRAM + 1)} for text in (a, b))
    return len(first & second) / len(first | second)


# -------------------------------------------------------------------------------------------------------- signatures


def test_ngrams_are_worked_by_hand():
    hashes, offsets = signatures._ngram_hashes(["abcdef", "ghijk", "ab", "abcde"])
    assert offsets.tolist() == [0, 2, 3, 4, 5] and len(hashes) == 5
    assert hashes[0] == hashes[4] and len(set(hashes.tolist())) == 4  # abcde twice
    assert signatures.signatures([]).shape == (0, 64)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8), st.integers(1, 30))
@settings(deadline=None)
def test_a_signature_depends_on_its_own_text_only(texts, characters):
    before, signatures.CHARACTERS = signatures.CHARACTERS, characters
    try:
        together = signatures.signatures(texts)
    finally:
        signatures.CHARACTERS = before
    assert together.shape == (len(texts), SIGNATURE_BYTES) and together.dtype == np.uint8
    for text, signature in zip(texts, together, strict=True):
        assert (signatures.signatures([text])[0] == signature).all()


def test_bytes_alike_estimate_the_similarity():
    assert similarity(np.array([64, 0])).tolist() == [1, 0]
    letters = random.Random(0)
    errors = []
    for _ in range(300):
        text = "".join(letters.choices("abcdefghij ", k=400))
        cut = letters.randrange(100, 400)
        other = text[:cut] + "".join(letters.choices("abcdefghij ", k=400 - cut))
        first, second = signatures.signatures([text, other])
        errors.append(similarity((first == second).sum()) - jaccard(text, other))
    assert abs(np.mean(errors)) < 0.01 and np.std(errors) < 0.065


def test_system_prompts_are_not_compared():
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "1"}, {"role": "assistant"}]
    assert text_of(messages) == "1\n"


# --------------------------------------------------------------------------------------------------------- the ledger


def test_test_rows_that_nearly_repeat_a_training_row_are_named_beside_the_exact_ones(run):
    write("train.jsonl", talk("1", "2"), talk(QUESTION, ANSWER), talk("something else", "altogether different"))
    write(
        "test.jsonl",
        talk(QUESTION.replace("lamp", "lamb"), ANSWER),
        talk(QUESTION, ANSWER),
        talk("a question of its own", "and its answer"),
        {**talk(QUESTION, ANSWER), "system": "T"},
    )
    data = run("dataset.test=test.jsonl")
    assert data.ledger["test_in_train"] == {"rows": 1, "named": ["test.jsonl:2"]}
    near = data.ledger["near_duplicates"]
    assert near["rows"] == 2 and near["named"][0] == "test.jsonl:4 ~ train.jsonl:2 (100%)"
    assert near["named"][1].startswith("test.jsonl:1 ~ train.jsonl:2 (9")
    line = "WARNING: 2 other rows of the test split nearly repeat a training row: test.jsonl:4 ~ train.jsonl:2 (100%), "
    assert line in ledger_table(data.ledger)
    assert any("nearly repeat a training row" in notice and "test.jsonl:4" in notice for notice in notices(data.ledger))
    assert run("dataset.test=test.jsonl").ledger["near_duplicates"] == near, "from the cache"


def test_near_copies_can_be_left_alone(run):
    write("train.jsonl", talk(QUESTION, ANSWER))
    write("test.jsonl", talk(QUESTION, ANSWER + "!"))
    assert "near_duplicates" not in run("dataset.test=test.jsonl", "dataset.near_duplicates=off").ledger
    ledger = run("dataset.test=test.jsonl").ledger
    assert ledger["near_duplicates"]["rows"] == 1
    assert "WARNING: 1 rows of the test split nearly repeat" in ledger_table(ledger), "of no others anything was said"
    assert "near_duplicates" not in run().ledger


def test_near_copies_are_found_over_several_files_and_within_a_share(run):
    others = [talk(f"{i} {i * 7919} {i * 104729}", f"{i * 1299709} {i * 15485863}") for i in range(1, 60)]
    write("train.jsonl", *others, talk(QUESTION, ANSWER))
    write("more.jsonl", talk("9", "8"), talk(QUESTION, ANSWER + "!"), talk(QUESTION + "!", ANSWER))
    write("test.jsonl", talk("5", "6"), talk(QUESTION + "?", ANSWER + "!"))
    data = run("dataset.train=[train.jsonl, more.jsonl]", "dataset.test=[more.jsonl, test.jsonl]")
    assert data.ledger["test_in_train"]["rows"] == 3
    assert data.ledger["near_duplicates"]["rows"] == 1
    assert data.ledger["near_duplicates"]["named"][0].startswith("test.jsonl:2 ~ more.jsonl:2 (9")
    write("copies.jsonl", *[talk(f"{QUESTION} {i}", ANSWER) for i in range(40)])
    shared = run("dataset.train=copies.jsonl", "dataset.test=0.25").ledger["near_duplicates"]
    assert shared["rows"] == 10 and len(shared["named"]) == 10


def test_rows_that_are_bad_do_not_shift_the_signatures(run):
    write("train.jsonl", "{", talk("1", "2"), talk("<|im_end|>", "2"), talk(QUESTION, ANSWER))
    write("test.jsonl", "{", talk(QUESTION, ANSWER + "!"))
    skip = ["dataset.on_error=skip", "dataset.control_tokens=skip", "dataset.max_lost=1"]
    near = run("dataset.test=test.jsonl", *skip).ledger["near_duplicates"]
    assert [name[:27] for name in near["named"]] == ["test.jsonl:2 ~ train.jsonl:"[:27]]
    assert "train.jsonl:4" in near["named"][0]


# ------------------------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize("slice_rows", [1, 3, 2**14])
def test_the_first_rows_of_each_key_are_worked_by_hand(monkeypatch, slice_rows):
    monkeypatch.setattr(near_copies, "SLICE", slice_rows)
    made = np.zeros((9, SIGNATURE_BYTES), np.uint8)
    made[:, 4] = [7, 5, 7, 3, 7, 9, 7, 7, 3]
    keys = near_copies._keys(made, 4)
    firsts = near_copies._first_rows(np.unique(keys[[3, 0]]), split(made), 4)
    assert firsts.tolist() == [[3, 8, -1, -1], [0, 2, 4, 6]]
    chosen = near_copies._first_rows(np.unique(keys[[3, 0]]), split(made, [2, 7, 8]), 4)
    assert chosen.tolist() == [[8, -1, -1, -1], [2, 7, -1, -1]]


def test_the_most_similar_row_is_named_and_others_are_not():
    rng = np.random.default_rng(0)
    made = rng.integers(0, 256, (1000, SIGNATURE_BYTES)).astype(np.uint8)
    looked_up = made[[10, 20, 30]].copy()
    made[500], made[600] = looked_up[0], looked_up[2]
    made[500, 60:] += 1  # 60 of 64 bytes alike, but row 10 is all alike
    looked_up[1, 40:] += 1  # 40 of 64: a similarity of 0.62
    looked_up[2, 50:] += 1  # 50 of 64
    found = find_near_copies(split(looked_up), split(made))
    assert (found.rows.tolist(), found.copied.tolist()) == ([0, 2], [10, 30])
    assert found.similarity.round(2).tolist() == [1.0, 0.78]


def test_near_copies_are_found_among_rows_that_share_most_of_their_bands():
    """As many rows made from one phrase do: the time stays linear, and the copy is found by its other bands."""
    rng = np.random.default_rng(0)
    made = rng.integers(0, 256, (20_000, SIGNATURE_BYTES)).astype(np.uint8)
    made[:, :32] = 1  # a similarity of 0.5 to each other
    looked_up = made[10_000:10_500].copy()
    looked_up[:, 60:] += 1
    found = find_near_copies(split(looked_up), split(made))
    assert found.copied.tolist() == list(range(10_000, 10_500))


def test_finding_near_copies_takes_less_than_64_bytes_a_row():
    rng = np.random.default_rng(0)
    made = rng.integers(0, 256, (200_000, SIGNATURE_BYTES)).astype(np.uint8)
    many, few = split(made), split(made[:1000])
    peaks = []
    for looked_up, among in ((few, many), (many, few)):
        tracemalloc.start()
        find_near_copies(looked_up, among)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    constant = 12 * 2**20
    assert peaks[0] < constant and peaks[1] < constant + 48 * 200_000
