"""Real recipes of other tools through `--from`, each then through `--check` on a small model.

    python benchmarks/migration.py MODEL FOLDER [FOLDER ...] [--data FILE] [--limit N]

Of each folder (a checkout of a tool's repository, or a part of it) all YAML files and shell scripts are taken that
run_sft.py recognises, and the commands in fenced blocks of .md and .py files; with --limit an even choice of N in the
order of their names. Model and data are those of the command line, as those of the recipes are not here, and report_to
is none; the rest is what the recipe says. Prints a table: what came of each, and a count. The data sets that a recipe
names are looked up all the same, and told where they cannot be.
"""

import argparse
import contextlib
import io
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import run_sft
from sft.errors import UserError
from sft.starting.data_sets import put_data_sets
from sft.starting.draft import Draft
from sft.starting.tool_files import read_tool_file

COMMAND = re.compile(r"^\s*(?:trl sft|(?:python|accelerate launch)[^\n]*\bsft\.py|llamafactory-cli train|swift sft)\b")


def recipes_in(folder: Path, made: Path) -> list[Path]:
    """Files of the folder that are recipes of a tool; commands of its texts as scripts, written to `made`."""
    found = []
    for file in sorted(p for p in folder.rglob("*") if p.suffix in (".yaml", ".yml", ".sh", ".md", ".py")):
        scripts = [file]
        if file.suffix in (".md", ".py"):
            scripts = []
            for number, block in enumerate(re.findall(r"```\w*\n(.*?)```", file.read_text("utf-8"), re.DOTALL)):
                if re.search(COMMAND.pattern, block, re.MULTILINE):
                    scripts.append(made / f"{'_'.join(file.relative_to(folder).with_suffix('').parts)}_{number}.sh")
                    scripts[-1].write_text(block, encoding="utf-8")
        for script in scripts:
            with contextlib.suppress(UserError):
                if script.suffix == ".sh" and not re.search(COMMAND.pattern, script.read_text("utf-8"), re.MULTILINE):
                    continue
                read_tool_file(script)
                found.append(script)
    return found


def outcome(file: Path, options: argparse.Namespace, made: Path) -> tuple[str, str]:
    """("checked", "") or ("refused" or "failed", the message)."""
    source = read_tool_file(file)
    recipe = made / "recipe.yaml"
    for left in made.glob("recipe.*"):
        left.unlink()
    overrides = [f"model_name_or_path={options.model}", f"dataset.train={options.data}", "training_args.report_to=none"]
    if "val" in " ".join(source.keys) or source.keys.keys() & {"eval_strategy", "test_datasets", "eval_dataset"}:
        overrides.append("dataset.validation=0.1")
    overrides += [f"dataset.{key}=null" for key in ("format", "columns")]
    code, said = run(["--from", str(file), str(recipe), *overrides])
    if code:
        return ("refused" if code == 2 else "failed"), said
    note = ""
    try:
        put_data_sets(source, Draft(), [])
    except UserError as error:
        note = f"its data: {error}"
    code, said = run([str(recipe), "--check"])
    return ("checked", note) if code == 0 else ("refused by --check" if code == 2 else "failed", said)


def run(arguments: list[str]) -> tuple[int, str]:
    """Exit code of run_sft.py, and the last lines of what it said of an error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_sft.main(arguments)
        except Exception as error:  # a bug of ours, which the table is to show
            return 1, f"{type(error).__name__}: {error}"
    return code, err.getvalue().strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--data", default="data/demo/validation.jsonl")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--errors", action="store_true", help="say the whole messages")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        print("| recipe | outcome | what was said |\n|---|---|---|")
        for root in options.folders:
            counts: Counter[str] = Counter()
            files = recipes_in(root, made)
            step = max(1.0, len(files) / options.limit) if options.limit else 1.0
            for file in [files[int(i * step)] for i in range(int(len(files) / step))]:
                result, said = outcome(file, options, made)
                counts[result] += 1
                name = file.relative_to(root) if file.is_relative_to(root) else file.name
                line = " ".join(
                    said.removeprefix("error: ")
                    .replace(f"{file}:", "line ")
                    .replace(f"{made}/", "")
                    .replace("|", "\\|")
                    .split()
                )
                print(f"| {root.name}/{name} | {result} | {line if options.errors else line[:160]} |", flush=True)
            print(f"\n{root.name}: {len(files)} recipes, {dict(counts)}\n", flush=True)


if __name__ == "__main__":
    main()
