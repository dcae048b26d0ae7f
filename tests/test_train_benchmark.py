"""benchmarks/train.py without the peers: what is counted, what is run, what the table says of recorded runs."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from statistics import median

import psutil
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import train
from benchmarks.flops import Weights
from benchmarks.peers import tools
from benchmarks.peers.cases import CASES, Case, answers_of, rows_of, speaks_chatml, tokens_of
from benchmarks.peers.record import real_tokens, supervised_tokens
from benchmarks.peers.table import summary, why_it_differs, written

SMALL = Case("chats", "two steps of two rows", rows_a_step=2, steps=2)


# ------------------------------------------------------------------------------------------------- what is counted


def test_padding_is_no_real_token():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 2, 2]])
    assert real_tokens({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}) == 6
    assert real_tokens({"input_ids": ids}) == 8, "rows without padding bring no mask"


def test_packed_rows_are_counted_by_what_a_token_sees_of_itself():
    # Two tokens, then one of another conversation, then padding.
    sees = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()[None, None]
    ids = torch.tensor([[5, 6, 7, 2]])
    assert real_tokens({"input_ids": ids, "attention_mask": sees}) == 3
    scores = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    assert real_tokens({"input_ids": ids, "attention_mask": scores}) == 3


def test_label_of_a_first_token_is_not_trained_on():
    assert supervised_tokens({"labels": torch.tensor([[5, -100, 7, 8], [-100, -100, 7, -100]])}) == 3


def test_step_is_the_sum_of_its_batches():
    batch = {"loss": 0.5, "tokens": 10, "supervised": 4, "places": 12}
    records = [batch, batch, {"step": 1, "time": 3.0}, batch, {"step": 2, "time": 4.0}]
    assert train._steps(records) == [
        {"step": 1, "time": 3.0, "loss": 1.0, "tokens": 20, "supervised": 8, "places": 24},
        {"step": 2, "time": 4.0, "loss": 0.5, "tokens": 10, "supervised": 4, "places": 12},
    ]


def test_flops_of_a_token_are_those_counted_by_hand():
    weights = Weights(linear=1000, lora=10, head=100)
    assert weights.flops_a_token(supervised=0.5, lora=True) == 4 * 1000 + 6 * 10 + 4 * 100 / 2
    assert weights.flops_a_token(supervised=0.5, lora=False) == 6 * 1000 + 6 * 100 / 2


# ------------------------------------------------------------------------------------------------------ what is run


@pytest.fixture(scope="module")
def rows(small_qwen):
    tokenizer = AutoTokenizer.from_pretrained(small_qwen)
    return [{"messages": row["messages"][:3]} for row in rows_of(SMALL, tokenizer)[:4]]


@pytest.fixture
def job(small_qwen, rows, tmp_path):
    def made(name):
        folder = tmp_path / name
        folder.mkdir()
        return tools.Job(SMALL, small_qwen, rows, "float32", folder)

    return made


def test_trl_and_ours_train_on_the_same_tokens_and_begin_at_the_same_loss(job, rows, small_qwen):
    runs = {name: train.run(Path(sys.executable), name, job(name)) for name in ("ours", "trl")}
    assert [run["problem"] for run in runs.values()] == [None, None]
    tokenizer = AutoTokenizer.from_pretrained(small_qwen)
    lengths = [tokens_of(row["messages"], tokenizer) for row in rows]
    for run in runs.values():
        assert [step["tokens"] for step in run["steps"]] == [sum(lengths[:2]), sum(lengths[2:])]
        assert run["peak_bytes"] > 1e8 and run["seconds"] > 1
    padded = [2 * max(lengths[:2]), 2 * max(lengths[2:])]
    assert [step["places"] for step in runs["trl"]["steps"]] == padded
    assert [step["places"] for step in runs["ours"]["steps"]] == [sum(lengths[:2]), sum(lengths[2:])], "no padding"
    ours, trl = (run["steps"] for run in runs.values())
    assert [step["supervised"] for step in ours] == [step["supervised"] for step in trl]
    assert ours[0]["loss"] == pytest.approx(trl[0]["loss"], rel=1e-5)
    assert ours[1]["loss"] == pytest.approx(trl[1]["loss"], rel=1e-3)


def test_run_that_fails_is_told_by_its_last_line(job, tmp_path):
    missing = dataclasses.replace(job("ours"), model=tmp_path / "none")
    result = train.run(Path(sys.executable), "ours", missing)
    assert result["steps"] == [] and result["problem"].startswith("exit code 2: ")


def test_run_that_takes_too_long_is_ended(job, monkeypatch):
    monkeypatch.setattr(train, "LIMIT_SECONDS", 1)
    result = train.run(Path(sys.executable), "trl", job("trl"))
    assert result["problem"] == "did not end its steps within 1 s" and result["seconds"] < 20
    assert not [each for each in psutil.Process().children(recursive=True) if "record.py" in " ".join(each.cmdline())]


def test_environment_that_is_there_is_used_again_and_pins_bring_no_torch(tmp_path):
    for name, tool in tools.TOOLS.items():
        if not tool.pins:
            assert tools.python_of(name, tmp_path) == Path(sys.executable)
            continue
        pins = (tools.HERE / tool.pins).read_text(encoding="utf-8")
        (tmp_path / name).mkdir()
        (tmp_path / name / "installed.txt").write_text(pins, encoding="utf-8")
        assert tools.python_of(name, tmp_path).is_relative_to(tmp_path / name)
        lines = [line for line in pins.splitlines() if not line.startswith("#")]
        assert len(lines) > 100 and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
        assert not [line for line in lines if re.match(r"torch(vision|audio)?==|nvidia", line)]


def test_chats_have_two_speakers_and_the_lengths_that_are_said(qwen_tokenizer):
    chats = rows_of(CASES["chats"], qwen_tokenizer)
    lengths = [tokens_of(chat["messages"], qwen_tokenizer) for chat in chats]
    assert speaks_chatml(qwen_tokenizer)
    assert len(chats) == 16 and max(lengths) <= 512 and 150 < median(lengths)
    assert {tuple(m["role"] for m in chat["messages"][1:3]) for chat in chats} == {("user", "assistant")}
    assert answers_of(chats) == sum(len(chat["messages"]) // 2 for chat in chats)


# ------------------------------------------------------------------------------------------------ what the table says


def recorded(tool, seconds, loss=2.0, supervised=50, case="chats", problem=None, others=0.1):
    steps = [
        {"step": i + 1, "time": 10 + i * seconds, "loss": loss, "tokens": 100, "supervised": supervised, "places": 120}
        for i in range(3)
    ]
    return {
        "case": case, "tool": tool, "dtype": "float32", "steps": [] if problem else steps, "peak_bytes": 2.5e9,
        "seconds": 60, "others": others, "problem": problem, "answers_in_first_step": 3, "linear": 1000, "lora": 10,
        "head": 100,
    }  # fmt: skip


def test_table_has_medians_ratios_by_round_and_what_failed(tmp_path):
    runs = [recorded("ours", 1), recorded("trl", 4), recorded("ours", 2), recorded("trl", 4), recorded("ours", 1)]
    runs += [
        recorded("trl", 5),
        recorded("ours", 30, others=0.6),
        recorded("trl", 4),
        recorded("ms-swift", 1, problem="exit code 1: no | such thing"),
    ]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")
    machine = {"cpu": "A CPU", "cores": 2, "threads": 2, "avx512_bf16": False, "memory_bytes": 24 * 2**30}
    # A token takes 4 x 1000 + 6 x 10 + 4 x 100 / 2 = 4260; 100 a second of these are 42.6 % of a million.
    (tmp_path / "machine.json").write_text(json.dumps(machine | {"flops": {"float32": 1e6}}), encoding="utf-8")
    text = written(tmp_path)
    assert text == (tmp_path / "table.md").read_text(encoding="utf-8")
    assert text.startswith("A CPU, 2 cores, 2 threads, no avx512_bf16, 24 GiB; a matrix product reaches 0 GFLOP/s in")
    lines = text.splitlines()[-3:]
    assert lines == [
        "| this repository | 100 (50 to 100) | 50 (25 to 50) |  | 2.5 GB | 43% | 2.0000 | 3, 1 left out |",
        "| trl 1.16.0, its script | 25 (20 to 25) | 12 (10 to 12) | 4.00 (2.00 to 5.00) | 2.5 GB | 11% | "
        "2.0000 (+0.0%) | 4 |",
        "| ms-swift 4.6.0 | exit code 1: no \\| such thing | | | | | | 0 |",
    ]
    rows = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))["rows"]
    assert rows[1]["ratio"] == [4, 2, 5]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, "+0.0%"),
        ({"loss": 2.01}, "+0.5%"),
        ({"loss": 2.1}, "+5.0%: the same tokens and labels"),
        ({"supervised": 53}, "+0.0%: trains on a token more an answer, the line break after the stop token"),
        ({"supervised": 98, "loss": 3.0}, "+50.0%: takes the loss on all tokens"),
        ({"supervised": 40}, "+0.0%: 40 labels for 50"),
    ],
)
def test_reason_of_another_first_loss_is_read_from_what_was_trained_on(changes, said):
    assert why_it_differs(recorded("trl", 1, **changes), recorded("ours", 1)) == said


def test_cases_come_in_their_order():
    runs = [recorded("ours", 1, case=name) for name in ("single", "tiny", "chats")]
    assert [row["case"] for row in summary(runs, {"float32": 1e6})] == ["chats", "tiny", "single"]
