"""What becomes of every row: the ledger, the policies, the splits, the cache, packing and streaming.

One token a character here: digits and single letters, with the one-letter system prompt "S". A message of n characters
is n + 5 tokens of Qwen's template (<|im_start|> role \\n ... <|im_end|> \\n), and an answer of n has n + 1 supervised.
"""

import json
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sft.files
from sft.data import cache, packing, splits, token_cache, tokens
from sft.data.chat import CONTROL_AS_TEXT, ChatEncoder, Encoded
from sft.data.ledger import find_repeats, ledger_table
from sft.data.packing import best_fit, pack
from sft.data.token_rows import Split, TokenRows
from sft.errors import DataError, FormatError, RecipeError
from sft.model.tokenizer import with_defaults
from sft.recipe import load_recipe
from tests.data.conftest import RECIPE, talk, texts, write
from tests.families import FAMILIES, build

ROOT = Path(__file__).resolve().parents[2]
BAD, CONTROL, OVERLONG = "bad row", "control token", "over-long"


@pytest.fixture
def files_read(monkeypatch):
    """The names of the files whose rows are read, as they are."""
    names, real = [], token_cache.read_rows

    def reading(file):
        names.append(str(file))
        return real(file)

    for module in (token_cache, splits):
        monkeypatch.setattr(module, "read_rows", reading)
    return names


# --------------------------------------------------------------------------------------------------------- the ledger


def test_ledger_says_what_became_of_every_row(run):
    write(
        "train.jsonl",
        talk("1", "2"),  # 18 tokens, 2 supervised
        "{",
        talk("1", "22", "3", "444"),  # 33 tokens, 7 supervised
        "",
        talk("<|im_end|>", "2"),
        talk("1", "2", "3", "4444444444"),  # 39 tokens, more than 33: cut to its first turn
        talk("1", "2222222222222222222"),  # 36 tokens, and nothing to cut
        talk("1", "2"),
    )
    skip = ["dataset.on_error=skip", "dataset.control_tokens=skip", "dataset.max_lost=1", "dataset.max_length=33"]
    data = run(*skip)
    (file,) = data.ledger["files"]
    assert len(file.pop("sha256")) == 64
    assert file == {
        "split": "train",
        "path": "train.jsonl",
        "weight": 1.0,
        "format": "conversation",
        "rows": 7,
        "used": 4,
        "trimmed": [6],
        "tokens": 18 + 33 + 18 + 18,
        "supervised_tokens": 2 + 7 + 2 + 2,
        "supervised_share": 0.1494,
        "dropped": {BAD: [2], CONTROL: [5], OVERLONG: [7]},
        "notes": {},
    }
    assert data.ledger["rows"] == {"train": 4}
    assert data.ledger["duplicates"] == {
        "rows": 2,
        "named": ["train.jsonl:6 = train.jsonl:1", "train.jsonl:8 = train.jsonl:1"],
    }
    assert len(data.train) == 4
    assert [sum(row["assistant_mask"]) for row in data.train] == [2, 7, 2, 2]
    json.dumps(data.ledger)


def test_ledger_table_shows_the_counts_and_names_the_lines(run):
    write("train.jsonl", talk("1", "2"), "{", talk("1", "2", "3", "4"), talk("1", "2"))
    data = run("dataset.on_error=skip", "dataset.max_lost=1", "dataset.max_length=20")
    assert ledger_table(data.ledger).splitlines() == [
        "split  file         rows  used  dropped  trimmed  tokens  supervised",
        "train  train.jsonl     4     3        1        1      54     6 (11%)",
        "train.jsonl: dropped 1 for bad row: lines 2",
        "train.jsonl: trimmed 1 to dataset.max_length: lines 3",
        "2 training rows repeat an earlier one: train.jsonl:3 = train.jsonl:1; train.jsonl:4 = train.jsonl:1",
    ]


def test_equal_rows_are_named_over_files_too(run):
    write("train.jsonl", talk("1", "2"), talk("3", "4"))
    write("more.jsonl", talk("5", "6"), talk("3", "4"))
    data = run("dataset.train=[train.jsonl, more.jsonl]")
    assert data.ledger["duplicates"] == {"rows": 1, "named": ["more.jsonl:2 = train.jsonl:2"]}


def test_test_rows_in_the_training_split_are_named(run):
    write("train.jsonl", talk("1", "2"), talk("3", "4"))
    write("test.jsonl", talk("5", "6"), talk("3", "4"), talk("1", "9"))
    data = run("dataset.test=test.jsonl")
    assert data.ledger["test_in_train"] == {"rows": 1, "named": ["test.jsonl:2"]}
    assert "WARNING: 1 rows of the test split are in the training split too: test.jsonl:2" in ledger_table(data.ledger)


def test_finding_repeated_rows_takes_16_bytes_a_row():
    half = 200_000
    count = 2 * half + 1
    hashes = np.random.default_rng(0).integers(-(2**62), 2**62, count, dtype=np.int64)
    hashes[half + 1 :] = hashes[1 : half + 1]  # the worst case: every row is repeated
    hashes[0] = -(2**63)  # but the one that sorts first, so that pairs lie across the slices
    lines = datasets.Dataset(pa.table({"line": pa.array(range(1, count + 1), pa.int32())}))
    rows = TokenRows([token_cache.TokenFile("a", lines, {}, [])], [1.0])
    rows.hashes = hashes
    tracemalloc.start()
    repeats, named = find_repeats(Split("train", rows, np.arange(0))).values()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert repeats == half and len(named) == 20
    assert all(int(a[2:]) - int(b[2:]) == half for a, b in (name.split(" = ") for name in named))
    assert hashes.nbytes + peak < 16 * count + 2**20 * 2


# ---------------------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize(
    ("key", "line", "said"),
    [
        ("on_error", "{", "train.jsonl:2: is not JSON: Expecting property name"),
        ("control_tokens", talk("<|im_end|>", "2"), "train.jsonl:2: spells the control token '<|im_end|>'"),
    ],
)
def test_bad_rows_stop_the_run_or_are_skipped(run, key, line, said):
    write("train.jsonl", talk("1", "2"), line)
    with pytest.raises(DataError) as caught:
        run(f"dataset.{key}=error", "dataset.max_lost=1")
    assert str(caught.value).startswith(said)
    assert f"set dataset.{key}: skip" in str(caught.value)
    data = run(f"dataset.{key}=skip", "dataset.max_lost=1")
    assert len(data.train) == 1
    assert list(data.ledger["files"][0]["dropped"].values()) == [[2]]


def test_spelled_control_tokens_can_be_plain_text(run, tokenizer):
    write("train.jsonl", talk("1", "2"), talk("<|im_end|>", "2"))
    data = run("dataset.control_tokens=text")
    assert data.ledger["files"][0]["notes"] == {CONTROL_AS_TEXT: 1}
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [row["input_ids"].count(end) for row in data.train] == [3, 3]
    assert "user\n<|im_end|><|im_end|>" in tokenizer.decode(data.train[1]["input_ids"])


@pytest.mark.parametrize(
    ("policy", "expected", "dropped", "trimmed"),
    [("trim", ["S 1 2", "S 1 2"], {OVERLONG: [3]}, [2]), ("drop", ["S 1 2"], {OVERLONG: [2, 3]}, [])],
)
def test_over_long_rows_are_cut_or_dropped(run, tokenizer, policy, expected, dropped, trimmed):
    write("train.jsonl", talk("1", "2"), talk("1", "2", "3", "4"), talk("1", "22"))
    data = run(f"dataset.overlength={policy}", "dataset.max_length=18", "dataset.max_lost=1")
    assert [text.replace("<|im_end|>", "") for text in texts(tokenizer, data.train)] == expected
    assert (data.ledger["files"][0]["dropped"], data.ledger["files"][0]["trimmed"]) == (dropped, trimmed)


def test_over_long_rows_can_be_an_error(run):
    write("train.jsonl", talk("1", "2"), talk("1", "22"))
    with pytest.raises(DataError, match=r"^train.jsonl:2: 19 tokens, more than dataset.max_length 18\n"):
        run("dataset.overlength=error", "dataset.max_length=18", "dataset.max_lost=1")


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "phi3"])
def test_a_cut_row_is_the_conversation_that_ended_there(run, name):
    """Qwen3 writes an empty <think> block before a last answer only, Phi-3 an end of text after it."""
    family = build(FAMILIES[name], "bytes")
    long = ["1", "22", "3", "444", "5", "6" * 300]
    write("train.jsonl", talk(*long))
    write("ended.jsonl", talk(*long[:4]))
    both = ["dataset.train=[train.jsonl, ended.jsonl]", "dataset.max_length=150", "dataset.max_lost=1"]
    data = run(*both, "chat.examples=whole", tokenizer=family)
    assert data.train[0] == data.train[1]
    assert [file["trimmed"] for file in data.ledger["files"]] == [[1], []]


def test_a_row_is_not_cut_to_more_than_fits(run):
    """The stop token of the first answer is the 17th token, but the conversation that ends there has 18."""
    write("train.jsonl", talk("1", "2", "3", "4"))
    with pytest.raises(DataError, match="its first answer does not end within it"):
        run("dataset.max_length=17", "dataset.max_lost=1")
    assert run("dataset.max_length=18", "dataset.max_lost=1").ledger["files"][0]["trimmed"] == [1]


def test_a_first_answer_that_is_too_long_drops_the_row_and_says_why(run):
    write("train.jsonl", talk("1", "2"), talk("1", "2" * 30, "3", "4"))
    with pytest.raises(DataError, match="and its first answer does not end within it") as caught:
        run("dataset.max_length=20")
    assert "1 of 2 rows of dataset.train were skipped, dropped or trimmed (50.0%)" in str(caught.value)


def test_a_row_that_cannot_be_encoded_when_cut_is_a_bad_row(run, monkeypatch):
    real = ChatEncoder.encode

    def refusing(self, messages, tools=None, **how):
        if messages[-1]["content"] == "cut":
            raise FormatError("the chat template refuses this conversation")
        return real(self, messages, tools)

    monkeypatch.setattr(ChatEncoder, "encode", refusing)
    write("train.jsonl", talk("1", "2"), talk("1", "cut", "3", "4" * 99))
    with pytest.raises(DataError, match=r"^train.jsonl:2: the chat template refuses"):
        run("dataset.max_length=90")


def test_a_row_without_an_answer_is_a_bad_row(run, monkeypatch):
    real = ChatEncoder.encode_rendered

    def without_turns(self, rendered):
        first, *others = real(self, rendered)
        return [Encoded(first.input_ids, [], first.notes), *others]

    monkeypatch.setattr(ChatEncoder, "encode_rendered", without_turns)
    write("train.jsonl", talk("1", "2"), talk("3", "4"))
    data = run("dataset.on_error=skip", "dataset.max_lost=1")
    assert data.ledger["files"][0]["dropped"] == {BAD: [1]}
    assert all(any(row["assistant_mask"]) for row in data.train) and len(data.train) == 1


def test_loss_on_the_last_turn_only(run, tokenizer):
    write("train.jsonl", talk("1", "2", "3", "44"))
    every, last = run().train[0], run("chat.loss_on=last_turn").train[0]
    supervised = [
        tokenizer.decode([token for token, mask in zip(row["input_ids"], row["assistant_mask"], strict=True) if mask])
        for row in (every, last)
    ]
    assert supervised == ["2<|im_end|>44<|im_end|>", "44<|im_end|>"]


def test_variables_of_the_template_are_part_of_the_key(run, files_read):
    family = build(FAMILIES["qwen3"], "bytes")
    write("train.jsonl", talk("1", "2"))
    run(tokenizer=family)
    family.chat_template = with_defaults(family.chat_template, {"enable_thinking": False})
    run(tokenizer=family)
    assert files_read == ["train.jsonl"] * 2


def test_loss_after_the_reasoning_only(run):
    family = build(FAMILIES["qwen3"], "bytes")
    write("train.jsonl", talk("1", "2"))
    (row,) = run("chat.loss_on=after_thinking", tokenizer=family).train
    trained_on = [token for token, mask in zip(row["input_ids"], row["assistant_mask"], strict=True) if mask]
    assert family.decode(trained_on) == "2<|im_end|>"


def test_more_lost_rows_than_the_recipe_allows_is_an_error(run):
    write("train.jsonl", *[talk("1", str(i)) for i in range(9)], "{")
    with pytest.raises(DataError, match=r"1 of 10 rows .* \(10.0%\), more than dataset.max_lost 9.0%"):
        run("dataset.on_error=skip", "dataset.max_lost=0.09")
    assert len(run("dataset.on_error=skip", "dataset.max_lost=0.1").train) == 9


def test_a_trimmed_row_counts_as_lost(run):
    write("train.jsonl", talk("1", "2"), talk("1", "2", "3", "4"))
    with pytest.raises(DataError, match="more than dataset.max_lost 49.0%"):
        run("dataset.max_length=20", "dataset.max_lost=0.49")


# ------------------------------------------------------------------------------------------------------------ splits


def ids_of(rows):
    return [tuple(row["input_ids"]) for row in rows]


def test_shares_are_seeded_disjoint_and_about_as_large_as_asked(run):
    write("train.jsonl", *[talk(str(i), "2") for i in range(500)])
    shares = ["dataset.validation=0.1", "dataset.test=0.2"]
    data = run(*shares)
    assert data.ledger["rows"] == {"train": 350, "validation": 50, "test": 100}
    assert len(data.train) == 350 and len(data.validation) == 50 and len(data.test_conversations) == 100
    train, validation = set(ids_of(data.train)), set(ids_of(data.validation))
    test = {int(place.split(":")[1]) for place, _ in data.test_conversations}
    lines = dict(zip(ids_of(data.files[0].rows), data.files[0].rows["line"], strict=True))
    assert len(train | validation) == 400
    assert {lines[row] for row in train | validation} | test == set(range(1, 501))
    place, conversation = data.test_conversations[0]
    assert place == f"train.jsonl:{int(conversation.messages[1]['content']) + 1}"
    assert ids_of(run(*shares).validation) == ids_of(data.validation)
    assert ids_of(run(*shares, "training_args.seed=7").validation) != ids_of(data.validation)
    assert run(*shares).ledger["test_in_train"]["rows"] == 0


def test_equal_rows_stay_on_one_side_of_a_share(run):
    write("train.jsonl", *[talk(str(i % 100), "2") for i in range(300)])
    data = run("dataset.validation=0.2")
    train, validation = set(ids_of(data.train)), set(ids_of(data.validation))
    assert not train & validation and len(train) + len(validation) == 100
    assert len(data.train) + len(data.validation) == 300 and len(data.validation) == 60


def test_weights_repeat_rows_and_choose_among_them(run):
    write("train.jsonl", *[talk(str(i), "2") for i in range(200)])
    write("more.jsonl", talk("7", "8"), talk("7", "9"))
    weighted = "dataset.train=[{path: train.jsonl, weight: 0.5}, {path: more.jsonl, weight: 2}]"
    rows = ids_of(run(weighted).train)
    assert [rows.count(row) for row in rows[-4:]] == [2, 2, 2, 2]
    half = rows[:-4]
    assert 80 < len(half) < 120 and len(set(half)) == len(half)
    assert ids_of(run(weighted).train) == rows


def test_weights_that_leave_no_row_are_an_error(run):
    write("train.jsonl", talk("1", "2"))
    with pytest.raises(RecipeError, match="its weights leave no row"):
        run("dataset.train={path: train.jsonl, weight: 0.0001}")


def test_who_brings_other_training_rows_hears_which_splits_are_still_the_recipes(empty_folder):
    files = "{train: a.jsonl, validation: [b.jsonl, c.jsonl], test: d.jsonl}"
    Path("recipe.yaml").write_text(f"model_name_or_path: m\noutput_dir: o\ndataset: {files}\n", encoding="utf-8")

    def said(*overrides):
        return splits.kept_from_recipe(load_recipe("recipe.yaml", overrides))

    both = "dataset.validation (b.jsonl, c.jsonl) and dataset.test (d.jsonl)"
    assert said("dataset.train=mine.jsonl") == (
        f"dataset.train is yours, with {both} of recipe.yaml; to hold out a tenth of your own rows for each "
        "instead: dataset.validation=0.1 dataset.test=0.1"
    )
    assert "with dataset.test (d.jsonl) of recipe.yaml" in said("dataset.train=mine.jsonl", "dataset.validation=0.2")
    mine = ["dataset.train=mine.jsonl", "dataset.validation=null", "dataset.test=t.jsonl"]
    assert said() == said(*mine) == said("dataset={train: e.jsonl}") == said("dataset.test=t.jsonl") == ""


def test_who_tests_under_another_system_prompt_than_was_trained_hears_it(run):
    def said(*overrides):
        recipe = load_recipe("recipe.yaml", overrides)
        return splits.strange_prompts(run(*overrides), recipe)

    write("train.jsonl", *[{"system": "T", **talk(str(i), "2")} for i in range(9)])
    write("test.jsonl", talk("3", "4"))  # the recipe gives it the system prompt "S"
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    assert said("dataset.test=test.jsonl").startswith("no row of the test split has a system prompt that training rows")
    assert said("dataset.test=test.jsonl", "dataset.system=T") == said("dataset.test=0.3") == said() == ""


def test_scoring_reads_the_test_split_only(run, files_read):
    write("train.jsonl", talk("1", "2"))
    write("test.jsonl", talk("3", "4"))
    data = run("dataset.test=test.jsonl", scoring_only=True)
    assert data.train is None and [place for place, _ in data.test_conversations] == ["test.jsonl:1"]
    assert set(files_read) == {"test.jsonl"}


# ----------------------------------------------------------------------------------------------------------- reading


def test_globs_lists_and_formats_mix(run, tokenizer):
    write("a1.jsonl", talk("1", "2"))
    write("a2.jsonl", {"instruction": "3", "output": "4"})
    write("b.jsonl", {"messages": [{"role": "user", "content": "5"}, {"role": "assistant", "content": "6"}]})
    data = run("dataset.train=[a*.jsonl, b.jsonl]")
    assert [(file["path"], file["format"]) for file in data.ledger["files"]] == [
        ("a1.jsonl", "conversation"),
        ("a2.jsonl", "instruction"),
        ("b.jsonl", "messages"),
    ]
    said = [text.replace("<|im_end|>", "") for text in texts(tokenizer, data.train)]
    assert said == ["S 1 2", "S 3 4", "S 5 6"]


def test_a_row_of_another_schema_later_is_a_bad_row(run):
    write("train.jsonl", "{", talk("1", "2"), {"instruction": "3", "output": "4"})
    data = run("dataset.on_error=skip", "dataset.max_lost=1")
    assert data.ledger["files"][0]["format"] == "conversation"
    assert data.ledger["files"][0]["dropped"] == {BAD: [1, 3]}


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"\xef\xbb\xbf%(a)s\r\n\r\n%(b)s\r\n", [1, 3]),
        (b"\n \n%(a)s\n\t\n%(b)s", [3, 5]),
        (b"[\n%(a)s,\n%(b)s]", [1, 2]),
        (b"\xef\xbb\xbf \n[%(a)s, %(b)s]\n", [1, 2]),
    ],
    ids=["BOM, CRLF", "blank lines, no last newline", "array", "array after BOM and blank"],
)
def test_files_are_read_however_they_are_written(run, content, lines):
    rows = {b"a": json.dumps(talk("1", "2")).encode(), b"b": json.dumps(talk("3", "4")).encode()}
    Path("train.jsonl").write_bytes(content % rows)
    data = run()
    assert data.files[0].rows["line"] == lines
    assert data.ledger["files"][0]["tokens"] == 36


@pytest.mark.parametrize(
    "content",
    [
        b'{"conversation": [{"human": "\\udc00", "assistant": "b"}]}\n',
        b'{"conversation": [{"human": "\xed\xa0\x80", "assistant": "b"}]}\n',  # the same, not escaped
        b'[{"conversation": [{"human": "\\udc00", "assistant": "b"}]}]',
    ],
    ids=["escaped", "raw bytes", "array"],
)
def test_half_a_surrogate_pair_is_a_bad_row(run, content):
    Path("train.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"^train.jsonl:1: (is not UTF-8|holds half of a surrogate)"):
        run()


def test_system_prompt_of_the_recipe_is_for_rows_that_bring_none(run, tokenizer):
    write("train.jsonl", talk("1", "2"), {**talk("1", "2"), "system": "T"})
    assert [text[:1] for text in texts(tokenizer, run().train)] == ["S", "T"]


def test_a_file_named_twice_in_a_split_is_an_error(run):
    write("train.jsonl", talk("1", "2"))
    with pytest.raises(RecipeError, match="dataset.train.*: names train.jsonl twice; give it a weight"):
        run("dataset.train=[./*.jsonl, train.jsonl]")


def test_one_file_may_serve_two_splits(run, files_read):
    write("train.jsonl", talk("1", "2"))
    data = run("dataset.validation=train.jsonl", "dataset.test=train.jsonl")
    assert (len(data.train), len(data.validation), len(data.test_conversations)) == (1, 1, 1)
    assert data.ledger["test_in_train"]["rows"] == 1
    assert [sorted(file) for file in data.ledger["files"]] == [sorted(data.ledger["files"][0])] * 3
    assert "stop_ids" not in data.ledger["files"][0]
    assert files_read == ["train.jsonl"] * 2  # tokenised once, read again for scoring


def test_a_file_of_bad_rows_beside_a_good_one_only_counts(run):
    write("train.jsonl", talk("1", "2"))
    write("bad.jsonl", "{", "{")
    skip = ["dataset.on_error=skip", "dataset.max_lost=1", "dataset.test=[bad.jsonl, train.jsonl]"]
    data = run(*skip, "dataset.train=[bad.jsonl, train.jsonl]", "dataset.packing=true")
    assert [file["used"] for file in data.ledger["files"]] == [0, 1, 0, 1]
    assert len(data.train) == 1 and [place for place, _ in data.test_conversations] == ["train.jsonl:1"]


def test_a_hub_id_that_cannot_be_reached_is_one_clear_error(run, monkeypatch):
    import huggingface_hub

    def refused(self, *args, **kwargs):
        assert kwargs["timeout"] <= 10
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refused)
    with pytest.raises(DataError, match="^nobody/nothing: is no file here, .* does not give it: no route to host$"):
        run("dataset.train=nobody/nothing")


def test_a_huge_line_is_one_row(run):
    write("train.jsonl", talk("1", "2"), talk("1", "23" * 500_000))
    data = run("dataset.max_length=2000000", "dataset.overlength=error")
    assert data.ledger["files"][0]["tokens"] == 18 + 17 + 1_000_000
    assert len(data.train[1]["input_ids"]) == 1_000_017


def test_batches_of_long_rows_are_short(run, monkeypatch):
    """So that no batch holds the 2**31 tokens past which Arrow's offsets overflow."""
    sizes, real = [], ChatEncoder.render_batch

    def recording(self, conversations, *known):
        sizes.append(len(conversations))
        return real(self, conversations, *known)

    monkeypatch.setattr(ChatEncoder, "render_batch", recording)
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 100)
    write("train.jsonl", *[talk(str(i), "2" * 60) for i in range(4)])
    assert len(run().train) == 4
    assert sizes == [2, 2, 0]


# ------------------------------------------------------------------------------------------------------------- cache


def test_a_second_run_reads_no_row(run, files_read):
    write("train.jsonl", talk("1", "2"), "{")
    skip = ["dataset.on_error=skip", "dataset.max_lost=1"]
    first, second = run(*skip), run(*skip)
    assert files_read == ["train.jsonl"]
    assert first.ledger == second.ledger and ids_of(first.train) == ids_of(second.train)
    assert first.encoder.stop_ids == second.encoder.stop_ids != set()


@pytest.mark.parametrize(
    "override",
    [
        "dataset.max_length=1000",
        "dataset.system=T",
        "chat.loss_on=last_turn",
        "chat.examples=whole",
        "dataset.overlength=drop",
    ],
)
def test_what_changes_the_rows_makes_them_anew(run, files_read, override):
    write("train.jsonl", talk("1", "2"))
    run()
    run(override)
    assert len(files_read) == 2


def test_another_template_tokenizer_or_content_makes_rows_anew(run, files_read):
    write("train.jsonl", talk("1", "2"))
    run()
    other = build(FAMILIES["qwen2_5"], "bytes")
    other.chat_template = other.chat_template.replace("'\\n'", "'\\n\\n'")
    run(tokenizer=other)
    run(tokenizer=build(FAMILIES["qwen2_5"], "metaspace"))
    write("train.jsonl", talk("1", "3"))
    data = run()
    assert len(files_read) == 4
    assert data.files[0].rows["line"] == [1]


def test_another_policy_reads_no_row_again(run, files_read):
    write("train.jsonl", talk("1", "2"), "{", talk("<|im_end|>", "3"), talk("1", "22"))
    skip = ["dataset.on_error=skip", "dataset.control_tokens=skip", "dataset.max_lost=1", "dataset.max_length=18"]
    run(*skip, "dataset.overlength=drop")
    for changed in ("on_error", "control_tokens", "overlength"):
        with pytest.raises(DataError):
            run(*skip, "dataset.overlength=drop", f"dataset.{changed}=error")
    run(*skip, "dataset.overlength=drop", "dataset.packing=true", "dataset.validation=train.jsonl")
    assert len(files_read) == 1


def test_a_broken_off_write_leaves_nothing_that_looks_whole(run, tmp_path, monkeypatch):
    write("train.jsonl", talk("1", "2"))
    real = tokens.FileTokeniser.facts

    def killed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens.FileTokeniser, "facts", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    left = [path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock"]
    assert left == [tmp_path / "cache" / "sft_token_rows"]
    monkeypatch.setattr(tokens.FileTokeniser, "facts", real)
    monkeypatch.setattr(sft.files.shutil, "rmtree", lambda *args, **kwargs: None)
    monkeypatch.setattr(tokens.FileTokeniser, "facts", killed)
    with pytest.raises(KeyboardInterrupt):  # killed for good: its folder stays
        run()
    assert list((tmp_path / "cache").rglob("rows.arrow"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert len(run().train) == 1
    assert len(list((tmp_path / "cache").rglob("rows.arrow"))) == 1, "what the killed run left is gone"


def test_rows_without_their_facts_are_made_again(run, tmp_path, files_read):
    write("train.jsonl", talk("1", "2"))
    run()
    (facts,) = (tmp_path / "cache").rglob("facts.json")
    facts.unlink()
    facts.with_name("rows.arrow").write_bytes(b"half")
    assert len(run().train) == 1 and len(files_read) == 2


def test_a_cache_that_cannot_be_written_is_a_clear_error(run, tmp_path, monkeypatch):
    write("train.jsonl", talk("1", "2"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(DataError, match="token rows cannot be kept there .*HF_DATASETS_CACHE"):
        run()


def test_a_file_that_is_being_made_is_waited_for(run, files_read, monkeypatch):
    write("train.jsonl", *[talk(str(i), "2") for i in range(20)])
    begun, real, results = threading.Event(), token_cache._write, []

    def slow(*args):
        begun.set()
        threading.Event().wait(0.3)
        real(*args)

    monkeypatch.setattr(token_cache, "_write", slow)
    threads = [threading.Thread(target=lambda: results.append(len(run().train))) for _ in range(2)]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert results == [20, 20] and files_read == ["train.jsonl"]


def test_two_processes_at_once_make_the_rows_once_and_neither_removes_what_the_other_uses(run, tmp_path):
    write("train.jsonl", *[talk(str(i), "2") for i in range(50)])
    for i in range(2):
        write(f"own{i}.jsonl", talk("own", str(i)))
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    script = """
import sys, time, datasets
from sft.data import cache, splits, token_cache, tokens
from pathlib import Path
from sft.model.tokenizer import with_defaults
from sft.recipe import load_recipe
from sft.recipe import load_recipe
from tests.families import FAMILIES, build
datasets.config.HF_DATASETS_CACHE = Path("cache")
made, real = [], token_cache._write
def slow(*args):
    made.append(1); time.sleep(0.5); real(*args)
token_cache._write = slow
tokenizer = build(FAMILIES["qwen2_5"], "bytes")
def together(name):
    Path(f"{name}{sys.argv[1]}").touch()
    while len(list(Path().glob(f"{name}*"))) < 2: time.sleep(0.01)
together("ready")
print(len(made), len(splits.prepare(load_recipe("recipe.yaml"), tokenizer).train), len(made))
own = [f"dataset.train=own{sys.argv[1]}.jsonl", "dataset.cache_gb=0"]
data = splits.prepare(load_recipe("recipe.yaml", own), tokenizer)
together("prepared")
removed = cache.shrink(0)
together("shrunk")
print(len(removed), [Path(file["filename"]).exists() for file in data.train.cache_files])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen([sys.executable, "-c", script, str(i)], env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    said = sorted(process.communicate(timeout=300)[0].strip() for process in both)
    assert said == ["0 50 0\n0 [True]", "0 50 1\n0 [True]"]
    assert len(cache.entries()) == 3 and len(cache.shrink(0)) == 3, "they have ended"
    assert not list((tmp_path / "cache/sft_token_rows").glob("[!.]*.used"))


def test_rows_are_memory_mapped(run, tmp_path):
    write("train.jsonl", *[talk(str(i), "2" * 2000) for i in range(300)])  # 3,000,000 bytes
    run()
    before = pa.total_allocated_bytes()
    data = run("dataset.validation=0.1")
    data.train[5]
    assert [Path(file["filename"]).name for file in data.train.cache_files] == ["rows.arrow"]
    assert pa.total_allocated_bytes() - before < 100_000


# ----------------------------------------------------------------------------------------------------------- packing


def conversations_of(packed):
    """Each conversation of packed rows, as (its ids, its mask)."""
    for row in packed:
        begin = 0
        for length in row["seq_lengths"]:
            end = begin + length
            yield tuple(row["input_ids"][begin:end]), tuple(row["assistant_mask"][begin:end])
            begin = end
        assert begin == len(row["input_ids"]) == len(row["assistant_mask"])


def test_packing_keeps_every_conversation_once_and_whole(run):
    write("train.jsonl", *[talk(str(i), "2" * (i * 7 % 40 + 1)) for i in range(120)])
    write("more.jsonl", *[talk(str(i), "3" * (i % 5 + 1)) for i in range(30)])
    options = [
        "dataset.train=[{path: train.jsonl, weight: 1.5}, {path: more.jsonl, weight: 2}]",
        "dataset.validation=0.2",
        "dataset.max_length=64",
    ]
    plain, packed = run(*options), run(*options, "dataset.packing=true")
    for split in ("train", "validation"):
        rows, packs = getattr(plain, split), getattr(packed, split)
        kept = sorted((tuple(row["input_ids"]), tuple(row["assistant_mask"])) for row in rows)
        assert sorted(conversations_of(packs)) == kept
        assert all(len(row["input_ids"]) <= 64 for row in packs)
        assert packed.ledger["packing"][split] == len(packs) < len(rows)
        at_once = packs[:]
        assert [at_once["input_ids"][i] for i in range(3)] == [packs[i]["input_ids"] for i in range(3)]


def test_packed_rows_are_the_same_each_time(run):
    write("train.jsonl", *[talk(str(i), "2" * (i % 20 + 1)) for i in range(60)])
    options = ["dataset.packing=true", "dataset.max_length=64"]
    assert list(run(*options).train) == list(run(*options).train)


def test_packed_rows_are_not_copied(run):
    write("train.jsonl", *[talk(str(i), "2" * 2000) for i in range(300)])  # 3,000,000 bytes
    run()
    before = pa.total_allocated_bytes()
    assert len(run("dataset.packing=true", "dataset.max_length=8192").train) == 75  # four in each
    assert pa.total_allocated_bytes() - before < 100_000


def test_best_fit_is_worked_by_hand():
    def bins(lengths, capacity):
        return best_fit(np.array(lengths), capacity).to_pylist()

    assert bins([3, 5, 2, 4], capacity=7) == [[1, 2], [3, 0]]
    assert bins([4, 4, 4], capacity=4) == [[0], [1], [2]]
    assert bins([6, 5, 3, 2], capacity=8) == [[0, 3], [1, 2]]
    assert bins([5, 6, 2], capacity=8) == [[1, 2], [0]]  # the fuller one, 6, takes the 2
    assert bins([9, 8, 6, 2], capacity=10) == [[0], [1, 3], [2]]  # 8 takes it, though 6 has more room
    assert bins([2, 2, 2, 2, 2], capacity=5) == [[0, 1], [2, 3], [4]]  # two to a row at once


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(30, 40))
def test_best_fit_places_each_row_in_the_bin_that_it_fills_most_the_longest_rows_first(lengths, capacity):
    bins, left, changed = [], [], []
    for now, row in enumerate(sorted(range(len(lengths)), key=lambda row: -lengths[row]), start=1):
        fits = [each for each in range(len(bins)) if left[each] >= lengths[row]]
        if not fits:
            fits = [len(bins)]
            bins, left, changed = [*bins, []], [*left, capacity], [*changed, 0]
        chosen = min(fits, key=lambda each: (left[each], -changed[each]))  # of equal ones that which changed last
        bins[chosen].append(row)
        left[chosen] -= lengths[row]
        changed[chosen] = now
    assert best_fit(np.array(lengths), capacity).to_pylist() == bins


def test_rows_are_packed_so_many_at_a_time_that_memory_stays(monkeypatch):
    lengths = [1 + (7 * i) % 11 for i in range(20)]
    rows = datasets.Dataset.from_dict(
        {name: [[i] * n for i, n in enumerate(lengths)] for name in ("input_ids", "assistant_mask")}
    )
    whole = [row["seq_lengths"] for row in pack(rows.select(range(7, 14)), 16)]
    monkeypatch.setattr(packing, "PACKED_TOGETHER", 7)
    packed = list(pack(rows, 16))
    members = [list(dict.fromkeys(row["input_ids"])) for row in packed]
    assert sorted(member for each in members for member in each) == list(range(20))
    assert all(len({member // 7 for member in each}) == 1 for each in members)
    assert [row["seq_lengths"] for row, each in zip(packed, members, strict=True) if each[0] // 7 == 1] == whole


def test_packing_a_selection_takes_the_selected_rows():
    rows = datasets.Dataset.from_dict(
        {"input_ids": [[1], [2, 2], [3, 3, 3], [4, 4]], "assistant_mask": [[1], [0, 1], [0, 0, 1], [0, 1]]}
    )
    packed = pack(rows.select([3, 2, 3]), max_length=5)
    assert [packed[i] for i in range(len(packed))] == [
        {"input_ids": [3, 3, 3, 4, 4], "assistant_mask": [0, 0, 1, 0, 1], "seq_lengths": [3, 2]},
        {"input_ids": [4, 4], "assistant_mask": [0, 1], "seq_lengths": [2]},
    ]


# --------------------------------------------------------------------------------------------------------- streaming

STREAM = ["dataset.streaming=true", "training_args.max_steps=2"]


def test_streamed_rows_are_those_of_the_data_set(run):
    write("train.jsonl", talk("1", "2"), talk("3", "4"))
    write("more.jsonl", {"instruction": "5", "output": "6"})
    both = "dataset.train=[train.jsonl, more.jsonl]"
    streamed = run(both, *STREAM)
    assert list(streamed.train) == list(run(both).train)
    assert list(streamed.train) == list(run(both).train), "a second epoch"
    assert "streamed while training, not counted: train.jsonl, more.jsonl" in ledger_table(streamed.ledger)


def test_a_packed_stream_has_every_conversation_once_in_full_rows_of_a_seeded_order(run, monkeypatch):
    monkeypatch.setattr("sft.data.packing.STREAM_BUFFER", 16)
    write("train.jsonl", *(talk("1", "2" * (1 + i % 7)) for i in range(40)))
    apart = [row["input_ids"] for row in run("dataset.packing=false").train]
    stream = run(*STREAM, "dataset.packing=true", "dataset.max_length=64").train
    rows = list(stream)
    assert list(stream) == rows, "a second epoch"
    told = [np.split(row["input_ids"], np.cumsum(row["seq_lengths"])[:-1]) for row in rows]
    assert sorted(list(ids) for row in told for ids in row) == sorted(apart)
    assert max(len(row["input_ids"]) for row in rows) <= 64 and len(rows) <= 17  # of 40, three or two to a row
    assert all(len(row["assistant_mask"]) == len(row["input_ids"]) for row in rows)
    assert rows != list(run(*STREAM, "dataset.packing=true", "dataset.max_length=64", "training_args.seed=1").train)


def test_rows_that_are_all_too_long_are_told_the_key_to_raise(run):
    write("train.jsonl", talk("1 2 3 4 5", "2"), talk("1", "2 3 4 5 6"))
    with pytest.raises(DataError, match=r"is left to use\n.*(\n.*)*\nraise dataset.max_length, if the model takes"):
        run("dataset.max_length=2", "dataset.max_lost=1")


def test_a_bad_row_stops_a_stream_or_is_skipped(run):
    write("train.jsonl", talk("1", "2"), "{")
    with pytest.raises(DataError, match=r"^train.jsonl:2: is not JSON"):
        list(run(*STREAM).train)
    assert len(list(run(*STREAM, "dataset.on_error=skip").train)) == 1


def test_a_stream_of_bad_rows_only_is_an_error(run):
    write("train.jsonl", "{", "{")
    with pytest.raises(DataError, match=r"^train.jsonl:1: is not JSON"):
        list(run(*STREAM).train)
    with pytest.raises(DataError, match="no row of dataset.train is left to use"):
        list(run(*STREAM, "dataset.on_error=skip").train)


def test_streaming_needs_max_steps_and_takes_no_weights(run):
    write("train.jsonl", talk("1", "2"))
    with pytest.raises(RecipeError, match="set training_args.max_steps"):
        run("dataset.streaming=true")
    with pytest.raises(RecipeError, match="a stream has no weights"):
        run(*STREAM, "dataset.train={path: train.jsonl, weight: 2}")


def test_ledger_table_leaves_out_what_happened_to_no_row(run):
    write("train.jsonl", talk("Hi.", "Ho."))
    assert ledger_table(run().ledger).splitlines()[0] == "split  file         rows  used  tokens  supervised"
