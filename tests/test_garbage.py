"""Broken inputs for every reader, tests/garbage.py: each gets one clear answer, in bounded time and memory."""

import tempfile
import time
from collections import Counter

import pytest

import run_sft
from sft.model.machine import peak_memory_bytes
from tests.garbage import CASES, MEMORY, SECONDS, arguments_of, faults, lay_out, make_base, tree


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base(folder)
    return folder


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.heavy], ids=lambda case: f"{case.reader}: {case.name}"
)
def test_a_broken_input_gets_one_clear_answer_and_leaves_nothing(case, base, tmp_path, capfd, monkeypatch):
    lay_out(case, base, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before, peak, begun = tree(tmp_path), peak_memory_bytes(), time.perf_counter()
    code = run_sft.main(arguments_of(case))
    seconds, memory = time.perf_counter() - begun, peak_memory_bytes() - peak
    message = capfd.readouterr().err
    left = sorted(name for name, _ in tree(tmp_path).items() ^ before.items())
    assert not faults(case, code, message, left), message
    assert seconds < SECONDS and memory < MEMORY, (seconds, memory)


def test_each_reader_has_its_broken_inputs():
    broken = Counter(case.reader for case in CASES if case.says is not None)
    assert sum(broken.values()) >= 200 and len({(case.reader, case.name) for case in CASES}) == len(CASES)
    assert min(broken.values()) >= 6 and set(broken) == {
        "recipe", "override", ".jsonl", "row of a format", ".json", ".csv, .tsv", ".parquet", ".gz, .zst",
        "model folder", "tokenizer", "template", "adapter", "checkpoint", "path of data",
    }  # fmt: skip
