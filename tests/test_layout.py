"""Rules of the repository that no single module can keep."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sft.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
# The arrows between the rooms: what each may import beside itself and the error classes.
ROOMS = {
    "recipe": set(),
    "data": {"recipe"},
    "model": {"recipe"},
    "training": {"recipe", "data", "model"},
    "results": {"recipe", "data", "model"},
    "starting": {"recipe", "data", "model", "training"},
}


SHARED = ("errors", "faults", "files", "plain_text", "processes", "terminal")  # what stands beside the rooms


def module_name(path):
    """sft/data/chat.py -> sft.data.chat, sft/data/__init__.py -> sft.data"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Modules of ours that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name for name in names if name.split(".")[0] in ("sft", "formats", "metrics", "run_sft")}
    return found


def test_imports_point_one_way_between_the_rooms():
    for room, allowed in ROOMS.items():
        for path in (ROOT / "sft" / room).rglob("*.py"):
            rooms = {name.split(".")[1] for name in imports(path) if name.startswith("sft.")}
            assert rooms <= allowed | {room, *SHARED}, f"{path.relative_to(ROOT)} imports {rooms}"
    for name in SHARED:
        assert {found.split(".")[1] for found in imports(ROOT / f"sft/{name}.py")} <= set(SHARED)


def test_no_file_imports_one_that_imports_it():
    files = {module_name(path): path for path in (ROOT / "sft").rglob("*.py")}
    reached = {name: {found for found in imports(path) if found in files} for name, path in files.items()}
    while (wider := {name: found.union(*(reached[f] for f in found)) for name, found in reached.items()}) != reached:
        reached = wider
    assert len(files) > 20 and "sft.data.chat" in reached["sft.run"]
    assert not [name for name, found in reached.items() if name in found]


def test_formats_and_metrics_import_nothing_of_ours_but_the_errors():
    for path in [*(ROOT / "formats").glob("*.py"), *(ROOT / "metrics").glob("*/*.py")]:
        assert all(name.startswith("sft.errors") for name in imports(path)), path


def test_only_the_trainer_and_its_arguments_know_trl():
    for path in (ROOT / "sft").rglob("*.py"):
        if path.name not in ("trainer.py", "arguments.py"):
            assert not re.search(r"^\s*(from|import) trl\b", path.read_text(encoding="utf-8"), re.M), path


def test_no_module_shadows_a_library():
    names = {path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert not names & {"datasets", "evaluate", "accelerate", "utils"}


def test_reading_a_recipe_imports_no_torch():
    code = "import sys, run_sft; from sft.recipe import load_recipe; load_recipe('recipes/qwen_qlora.yaml')"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], cwd=ROOT, capture_output=True
    )
    assert done.stdout.strip() == b"False", done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    assert load_recipe(path).output_dir == Path("output") / path.stem


def test_readme_commands_are_what_ci_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tests = readme.split("<!-- tests:begin -->")[1].split("<!-- tests:end -->")[0]
    assert "pytest" in tests and "requirements-dev.txt" in tests
    for recipe in re.findall(r"recipes/(\w+)\.yaml", readme):
        assert (ROOT / f"recipes/{recipe}.yaml").is_file() or recipe == "mine", recipe


@pytest.mark.parametrize(
    "path",
    [p for p in [*ROOT.glob("formats/*.py"), *ROOT.glob("sft/**/*.py")] if ">>>" in p.read_text(encoding="utf-8")],
    ids=lambda path: path.stem,
)
def test_examples_in_docstrings_are_true(path):
    result = doctest.testmod(importlib.import_module(module_name(path)))
    assert result.attempted > 0 and result.failed == 0


def test_no_file_of_the_rooms_is_longer_than_400_lines_and_no_function_than_50():
    for path in (ROOT / "sft").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                documented = len((ast.get_docstring(node) or "").splitlines())
                assert node.end_lineno - node.lineno - documented < 50, f"{path}: {node.name}"
