"""docs/mask.md and docs/reasoning.md show what --check prints. After a change: python -m tests.data.test_mask_docs"""

import copy
import json
import re
import tempfile
from pathlib import Path

import datasets
import pytest

from sft.data.splits import prepare
from sft.errors import DataError
from sft.model.tokenizer import with_defaults
from sft.recipe import load_recipe
from sft.training.check import render_pieces, samples
from tests.families import FAMILIES, build

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "reasoning.md"
PAGES = [DOCS / "mask.md", PAGE]
BLOCK = re.compile(r"(<!-- check(?: of (?P<family>\w+))?: (?P<settings>.*?) -->\n```text\n)(.*?)(?=```)", re.DOTALL)
DAY = ["chat.date=2026-11-25"]


def shown(settings, row, folder, family="qwen3"):
    """The examples of a row as `--check` shows them, or its error, under settings as an override spells them."""
    (folder / "maren.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    recipe = folder / "recipe.yaml"
    text = f"model_name_or_path: m\noutput_dir: o\ndataset: {{train: {folder}/maren.jsonl, packing: false}}\n"
    recipe.write_text(text, encoding="utf-8")
    made = load_recipe(recipe, settings)
    tokenizer = build(FAMILIES[family], "bytes")
    tokenizer.chat_template = with_defaults(tokenizer.chat_template, made.chat.variables)
    try:
        found = samples(prepare(made, tokenizer), tokenizer)
    except DataError as error:
        return f"{error}\n".replace(f"{folder}/", "")
    texts = [f"{each['place']}\n{render_pieces(each['pieces'], False)}" for each in found]
    return "\n".join(texts).rstrip("\n").replace(f"{folder}/", "") + "\n"


def page_text(text):
    """The page with its blocks as they are now."""
    row = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    plain = copy.deepcopy(row)
    plain["messages"][1].pop("reasoning_content", None)

    def block(match):
        settings, without, _ = match["settings"].partition(" without reasoning")
        overrides = re.findall(r"\S+?=(?:\{.*?\}|\S+)", settings)
        said = plain if without else row
        with tempfile.TemporaryDirectory() as folder:
            return match[1] + shown(overrides + DAY, said, Path(folder), match["family"] or "qwen3")

    return BLOCK.sub(block, text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_shows_what_check_prints(page):
    text = page.read_text(encoding="utf-8")
    assert BLOCK.search(text)
    assert page_text(text) == text, "run python -m tests.data.test_mask_docs, and read what changed"


def test_page_shows_every_setting():
    found = BLOCK.finditer(PAGE.read_text(encoding="utf-8"))
    shown_settings = {(match["settings"], match["family"] == "gptoss") for match in found}
    for oss in (False, True):
        for examples in ("whole", "each_answer"):
            for loss_on in ("all_turns", "last_turn", "after_thinking"):
                assert (f"chat.examples={examples} chat.loss_on={loss_on}", oss) in shown_settings


def test_auto_is_each_answer_for_the_dialogue_of_the_page(tmp_path):
    row = json.loads(re.search(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1])
    for loss_on in ("all_turns", "last_turn", "after_thinking"):
        auto, each = (
            shown([f"chat.examples={mode}", f"chat.loss_on={loss_on}"], row, tmp_path)
            for mode in ("auto", "each_answer")
        )
        assert auto == each


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        for each in PAGES:
            each.write_text(page_text(each.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
