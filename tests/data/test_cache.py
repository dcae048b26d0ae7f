"""The cache of token rows: bounded, what was used last stays, shown and cleared by a command."""

import os
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from sft.data import cache
from tests.data.conftest import talk, write

DAY = 86_400


@pytest.fixture
def made(empty_folder):
    """Makes an entry of 1,000 bytes beside its facts, used some days ago."""

    def make(key, days_ago=0.0):
        folder = cache.cache_folder() / key
        folder.mkdir(parents=True)
        (folder / "rows.arrow").write_bytes(bytes(1000 - len('{"source": "a"}')))
        (folder / "facts.json").write_text('{"source": "a"}', encoding="utf-8")
        os.utime(folder / "facts.json", (1_700_000_000 - days_ago * DAY,) * 2)
        return folder

    return make


def keys():
    return sorted(folder.name for folder in cache.cache_folder().iterdir() if folder.is_dir())


def test_what_was_used_longest_ago_goes_first_until_the_rest_fits(made):
    for key, days_ago in (("new", 1), ("old", 9), ("older", 20), ("mid", 5)):
        made(key, days_ago)
    assert [entry.folder.name for entry in cache.shrink(2000)] == ["older", "old"]
    assert keys() == ["mid", "new"]
    assert cache.shrink(2000) == []


def test_what_another_process_holds_stays_whatever_its_age(made):
    made("old", 9)
    made("new", 1)
    with FileLock(cache.cache_folder() / "old.7-1.used"):
        assert [entry.folder.name for entry in cache.shrink(0)] == ["new"]
    with FileLock(cache.cache_folder() / "old.lock"):  # one that is being made, or taken up
        assert cache.shrink(0) == []
    assert [entry.folder.name for entry in cache.shrink(0)] == ["old"]


def test_a_run_keeps_its_own_rows_and_lets_go_of_older_ones(made, run):
    made("old", 9)
    write("train.jsonl", talk("1", "2"))
    assert len(run("dataset.cache_gb=0").train) == 1
    (entry,) = cache.entries()
    assert entry.source == "train.jsonl"


def test_use_makes_an_entry_young_again(made, run):
    write("train.jsonl", talk("1", "2"))
    run()
    (entry,) = cache.entries()
    os.utime(entry.folder / "facts.json", (1_000_000_000,) * 2)
    run()
    assert cache.entries()[0].used_at > 1_700_000_000


def test_what_a_killed_run_left_half_made_or_half_removed_goes(made):
    made("whole")
    for left in (".a.partial", ".b.removed", ".c.old"):
        (cache.cache_folder() / left).mkdir()
    with FileLock(cache.cache_folder() / "a.lock"):  # a run that is making it
        cache.shrink(1e9)
        assert keys() == [".a.partial", "whole"]
    cache.shrink(1e9)
    assert keys() == ["whole"]


def test_the_command_shows_the_cache_and_clears_it(made, capsys, monkeypatch):
    made("one")
    made("two", 3)
    monkeypatch.setattr(sys, "argv", ["cache"])
    assert cache.main() == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{cache.cache_folder()}: 2 tokenised files, 0.00 GB"
    assert [line.split()[-1] for line in shown[1:]] == ["a", "a"] and "used 2023-11-1" in shown[1]
    monkeypatch.setattr(sys, "argv", ["cache", "--clear"])
    assert cache.main() == 0
    assert "removed 2 tokenised files" in capsys.readouterr().out and keys() == []


def test_an_empty_cache_is_shown_and_cleared_too(empty_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cache", "--clear"])
    assert cache.main() == 0 and not Path("cache").exists()
    assert "0 tokenised files, 0.00 GB" in capsys.readouterr().out
