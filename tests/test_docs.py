"""The pages: their links lead somewhere, their commands run, and the Chinese README says what the English one does."""

import re
import shlex
from pathlib import Path

import pytest

import run_sft
from sft.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
ENGLISH, CHINESE = (ROOT / name for name in ("README.md", "README.zh-CN.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"run_sft\.py (recipes/\w+\.yaml[^`\n]*)")
SCRIPT = re.compile(r"python ((?:benchmarks/\w+|run_sft)\.py)([^`\n;&]*)")


def read(page):
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#]+)\)", re.sub(r"`[^`\n]*`", "", BLOCK.sub("", read(page))))
    here = [link for link in links if "://" not in link]
    assert [link for link in here if not (page.parent / link).exists()] == []


def test_every_page_of_docs_is_linked_from_the_readme_or_from_a_page_that_is():
    reached, pages = set(), [ENGLISH]
    while pages:
        page = pages.pop()
        reached.add(page)
        links = {(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#:]+\.md)\)", read(page))}
        pages += links - reached - set(pages)
    assert set(ROOT.glob("docs/*.md")) - reached == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_names_a_recipe_that_is_there_and_keys_that_it_takes(page):
    for command in COMMAND.findall(read(page)):
        recipe, *rest = shlex.split(command, comments=True)
        if recipe not in ("recipes/mine.yaml", "recipes/NAME.yaml"):
            load_recipe(ROOT / recipe, [word for word in rest if not word.startswith("-") and "=" in word])


def test_every_script_that_a_command_names_is_there_and_takes_its_options():
    seen = set()
    for page in PAGES:
        for script, rest in SCRIPT.findall(read(page)):
            source = read(ROOT / script)
            options = {word.partition("=")[0] for word in re.findall(r"(?<!\S)--[a-z][\w-]*", rest)}
            assert {option for option in options if f'"{option}"' not in source} == set(), (page.name, script)
            seen |= {(script, option) for option in options}
    assert {("run_sft.py", "--compare"), ("benchmarks/train.py", "--runs"), ("run_sft.py", "--from")} <= seen


def test_the_check_command_of_the_readme_runs(tiny_qwen, tmp_path, monkeypatch, capfd):
    block = next(text for _, text in BLOCK.findall(read(ENGLISH)) if "--check" in text)
    rows = next(text for kind, text in BLOCK.findall(read(ENGLISH)) if kind == "json").splitlines()
    monkeypatch.chdir(tmp_path)
    recipe, *rest = shlex.split(COMMAND.search(block)[1])
    rest += ["lora_config.layers_to_transform=null", "evaluation.general=off"]
    for row in rows:  # each schema of the page, many rows of it
        lines = [row.replace("2 + 2", f"{n} + 2").replace("Hello!", f"Hello, {n}!") for n in range(60)]
        Path("mine.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        assert run_sft.main([str(ROOT / recipe), *rest, f"model_name_or_path={tiny_qwen}"]) == 0
    said = capfd.readouterr().out
    assert "[[Ahoy, friend.<|im_end|>]]" in said and "[[4<|im_end|>]]" in said


def skeleton(text):
    """What two languages share: levels of headings, commands, and of each table its size and what is code in it."""
    blocks = [body for kind, body in BLOCK.findall(text) if kind in ("bash", "json", "yaml")]
    text = BLOCK.sub("", text)
    tables = [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    cells = [[(line.count("|"), re.findall(r"`[^`]*`", line)) for line in table] for table in tables]
    return {
        "headings": [len(level) for level in re.findall(r"^(#+) ", text, re.MULTILINE)],
        "blocks": blocks,
        "tables": cells,
        "links": re.findall(r"\]\(((?!README)[^)]+)\)", text),
        "code": sorted(re.findall(r"`[^`\n]+`", text)),
    }


def test_the_chinese_readme_has_the_headings_commands_tables_and_links_of_the_english_one():
    english, chinese = (skeleton(read(page)) for page in (ENGLISH, CHINESE))
    for part in english:
        assert chinese[part] == english[part], part
