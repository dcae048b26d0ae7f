"""What SECURITY.md promises and no other test holds: secrets, hostile text in terminals, paths, advisories."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import run_sft
from sft.plain_text import plain_text
from sft.training.check import render_pieces
from tests.garbage import make_base, tree

ROOT = Path(__file__).resolve().parents[1]
SECRETS = {
    "HF_TOKEN": "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",
    "WANDB_API_KEY": "plantedwandbkey0123456789",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret",
    "HF_ENDPOINT": "http://me:plantedpassword@127.0.0.1:9",
}
ESCAPE = "\x1b]0;owned\x07\x1b[2J"  # a title for the window, and a clear screen
BIDI = "\u202e"  # turns the direction of writing
HOSTILE = f"{ESCAPE}{BIDI}Hi."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base(folder)
    return folder


@pytest.fixture
def hostile_folder(base, tmp_path, monkeypatch):
    """A working folder whose data and the name of their file, found by a glob, hold what a terminal would obey."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base / "model", "model")
    rows = [{"conversation": [{"human": f"{HOSTILE} {i}", "assistant": f"Hello {ESCAPE}"}]} for i in range(4)]
    data = "train.jsonl" if sys.platform == "win32" else f"tr{ESCAPE}ain.jsonl"
    Path(data).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = (base / "recipe.yaml").read_text(encoding="utf-8")
    recipe = recipe.replace("train: train.jsonl", "train: '*.jsonl'\n  test: '*.jsonl'\n  max_lost: 1")
    recipe = recipe.replace("{merge: false}", "{merge: true}")
    recipe += "evaluation: {max_samples: 2, generation: {max_new_tokens: 3}}\n"
    Path("recipe.yaml").write_text(recipe, encoding="utf-8")
    return tmp_path


def test_a_whole_run_shows_and_keeps_no_secret_and_writes_into_its_folder_only(hostile_folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    places = {name: str(elsewhere / name) for name in ("HF_DATASETS_CACHE", "HF_HOME", "TMPDIR", "HOME")}
    for place in places.values():
        Path(place).mkdir()
    before = tree(hostile_folder)
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_sft.py"), "recipe.yaml", "--debug"],
        env={**os.environ, **SECRETS, **places, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        timeout=300,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    assert b"DEBUG " in log and b"\\x1b]0;owned" in log, "the log shows hostile text as text"
    assert b"\x1b" not in log and b"\x07" not in log and BIDI.encode() not in log
    changed = {name for name, _ in tree(hostile_folder).items() ^ before.items()}
    assert "out/report.html" in {name.replace(os.sep, "/") for name in changed}
    assert {Path(name).parts[0] for name in changed} == {"out"}
    kept = {path.relative_to(elsewhere).as_posix() for path in elsewhere.rglob("*") if path.is_file()}
    caches = ("HF_DATASETS_CACHE/sft_token_rows/", "HF_HOME/modules/", "HOME/.cache/matplotlib/fontlist-")
    assert [name for name in kept if not name.startswith(caches)] == []
    files = [path for folder in (hostile_folder / "out", elsewhere) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    for name, secret in SECRETS.items():
        planted = secret.encode() if name != "HF_ENDPOINT" else b"plantedpassword"
        assert planted not in log, name
        assert not [path for path in files if planted in path.read_bytes()], name


def test_check_shows_hostile_text_as_text(hostile_folder, capfd):
    assert run_sft.main(["recipe.yaml", "--check"]) == 0
    shown = capfd.readouterr()
    assert "\x1b" not in shown.out + shown.err and BIDI not in shown.out
    assert "\\x1b]0;owned\\x07\\x1b[2J\\u202eHi. 0" in shown.out


def test_colours_of_the_mask_are_the_only_escapes():
    assert render_pieces([("a\x1b[32m", False), ("b\x1b[0m", True)], colour=True) == (
        "a\\x1b[32m\x1b[32mb\\x1b[0m\x1b[0m"
    )


@pytest.mark.parametrize(("name", "secret"), SECRETS.items())
def test_a_secret_of_the_environment_is_dots_in_what_is_shown(name, secret, monkeypatch):
    monkeypatch.setenv(name, secret)
    shown = plain_text(f"GET {secret}/api")
    assert shown == ("GET http://...@127.0.0.1:9/api" if name == "HF_ENDPOINT" else "GET .../api")


def test_a_file_name_that_is_not_utf8_is_refused_before_it_is_read(base, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base / "model", "model")
    recipe = (base / "recipe.yaml").read_text(encoding="utf-8").replace("train.jsonl", "'*.jsonl'")
    Path("recipe.yaml").write_text(recipe, encoding="utf-8")
    try:
        Path("a\udcff.jsonl").write_text("{}\n", encoding="utf-8")
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system takes no such name")
    assert run_sft.main(["recipe.yaml"]) == 2
    assert "the name of a\\udcff.jsonl is not UTF-8; rename it" in capfd.readouterr().err


def test_advisories_are_told_and_never_a_failure(monkeypatch):
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci/audit.py")
    audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(audit)
    found = {"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}
    report = json.dumps({"dependencies": [found, {"name": "b", "skip_reason": "not found"}]})
    assert audit.told(report) == [
        "ADVISORY PYSEC-1: a 1; fixed in 2",
        "not looked up: 1 of 2 packages, which PyPI's service does not tell about",
    ]
    monkeypatch.setattr(audit.sys, "executable", "/nonexistent/python")
    (line,) = audit.audit()
    assert line.startswith("skipped: ")
