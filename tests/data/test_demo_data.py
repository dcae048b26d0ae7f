"""The claims the README of data/demo makes about the bundled dialogues."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

DEMO = Path(__file__).resolve().parents[2] / "data" / "demo"
CONVERSATION = ["train", "validation", "test"]
INSTRUCTION = ["train_instruction"]
NEAR_DUPLICATE = 0.4


def load(name):
    return [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def pairs(name):
    """(question, answer) of every turn in a file; an instruction's question is its instruction and its input."""
    if name in INSTRUCTION:
        return [((row["instruction"] + "\n" + row.get("input", "")).strip(), row["output"]) for row in load(name)]
    return [(turn["human"], turn["assistant"]) for row in load(name) for turn in row["conversation"]]


def words(text):
    return re.findall(r"[\w']+", text.lower())


def grams(text, n=4):
    found = words(text)
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def near_duplicates(texts):
    """Index pairs whose shared word 4-grams reach NEAR_DUPLICATE of the shorter text's."""
    sets = [grams(text) for text in texts]
    index = defaultdict(list)
    for number, found in enumerate(sets):
        for gram in found:
            index[gram].append(number)
    shared = Counter()
    for owners in index.values():
        shared.update((a, b) for i, a in enumerate(owners) for b in owners[i + 1 :])
    return [(a, b) for (a, b), n in shared.items() if n / min(len(sets[a]), len(sets[b])) >= NEAR_DUPLICATE]


def test_every_row_has_exactly_the_fields_of_its_schema():
    """A row is a conversation of human/assistant turns or an instruction with an input, all of it text."""
    for name in CONVERSATION:
        for row in load(name):
            assert set(row) == {"system", "conversation"} and row["conversation"]
            assert all(set(turn) == {"human", "assistant"} for turn in row["conversation"])
    for name in INSTRUCTION:
        for row in load(name):
            assert {"instruction", "output", "system"} <= set(row) <= {"instruction", "input", "output", "system"}
            assert all(isinstance(value, str) for value in row.values())
    for name in CONVERSATION + INSTRUCTION:
        assert all(isinstance(text, str) and text.strip() for pair in pairs(name) for text in pair)


def test_all_rows_share_one_system_prompt():
    """The base and the tuned model answer under the same sentence."""
    assert len({row["system"] for name in CONVERSATION + INSTRUCTION for row in load(name)}) == 1


def test_no_question_occurs_twice_within_or_across_splits():
    """No two questions of the whole set have the same words, so no row is shared either."""
    counts = Counter(" ".join(words(question)) for name in CONVERSATION + INSTRUCTION for question, _ in pairs(name))
    assert [question for question, n in counts.items() if n > 1] == []


def test_no_two_answers_are_near_duplicates():
    """The 4-gram rule holds for every pair of answers in all files."""
    answers = [answer for name in CONVERSATION + INSTRUCTION for _, answer in pairs(name)]
    assert [(answers[a], answers[b]) for a, b in near_duplicates(answers)] == []


def test_the_near_duplicate_rule_finds_a_planted_pair():
    """The rule reports two answers that differ in a word and spares one that shares only the closing."""
    planted = [
        "Aye, friend. Put the kettle on and wait for the tide. Keep your lamp lit.",
        "Aye, friend. Put the kettle on and wait for the moon. Keep your lamp lit.",
        "Calm sea, friend. Bread likes a hot oven and a slow cook. Keep your lamp lit.",
    ]
    assert near_duplicates(planted) == [(0, 1)]


def test_the_set_is_small_and_has_several_turns_and_both_schemas():
    """Between 230 and 260 dialogues, some with two or more turns, some instructions with an input text."""
    assert 230 <= sum(len(load(name)) for name in CONVERSATION + INSTRUCTION) <= 260
    for name in CONVERSATION:
        assert any(len(row["conversation"]) > 1 for row in load(name))
    assert any(row.get("input") for row in load("train_instruction"))


def test_every_answer_is_short():
    """Answers have 5 to 70 words."""
    for name in CONVERSATION + INSTRUCTION:
        assert [answer for _, answer in pairs(name) if not 5 <= len(words(answer)) <= 70] == []


def test_no_file_spells_a_control_token_or_a_carriage_return():
    """Templates stay in charge of control tokens and the files have LF line ends."""
    for name in CONVERSATION + INSTRUCTION:
        raw = (DEMO / f"{name}.jsonl").read_bytes()
        assert b"<|" not in raw and b"\r" not in raw and raw.endswith(b"}\n")
