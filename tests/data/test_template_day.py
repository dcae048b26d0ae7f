"""chat.date: a template that shows the day shows that of the run, today and when the run goes on tomorrow."""

import json
import re
from datetime import date
from pathlib import Path

import pytest

from sft import settle
from sft.data.chat import ChatEncoder
from sft.data.chat_template import shows_day
from sft.data.conversation import Conversation
from sft.errors import RecipeError
from sft.model.tokenizer import with_defaults
from sft.recipe import load_recipe
from sft.results.parity import prove_parity
from tests.data.conftest import RECIPE, talk, write
from tests.families import FAMILIES, build, template
from tests.results.test_parity import save

Q, A = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}
SHOWN = {"gptoss": "Current date: 2026-11-24", "llama3_2": "Today Date: 24 Nov 2026"}


def tokenizer_for(name):
    tokenizer = build(FAMILIES.get(name, FAMILIES["llama3"]), "bytes")
    tokenizer.chat_template = template(name)
    return tokenizer


def settled(*overrides, name="gptoss"):
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return settle.day(load_recipe("recipe.yaml", overrides), tokenizer_for(name)).chat.date


@pytest.mark.parametrize("name", SHOWN)
def test_a_template_shows_the_day_of_the_run_in_texts_and_prompts(name):
    encoder = ChatEncoder(tokenizer_for(name), day="2026-11-24")
    for ids in (encoder.encode([Q, A]).input_ids, encoder.encode_prompt([Q])):
        assert SHOWN[name] in encoder.tokenizer.decode(ids)


def test_which_templates_show_the_day_is_found_by_rendering():
    assert shows_day(tokenizer_for("gptoss")) and shows_day(tokenizer_for("llama3_2"))
    assert not shows_day(tokenizer_for("llama3"))
    llama = tokenizer_for("llama3_2")
    llama.chat_template = with_defaults(llama.chat_template, {"date_string": "26 Jul 2024"})
    assert not shows_day(llama)


def test_a_run_that_goes_on_tomorrow_shows_the_day_on_which_it_began(empty_folder):
    assert settled() == date.today().isoformat()
    Path("out").mkdir()
    before = {"recipe": {"chat": {"date": "2026-11-24"}}}
    Path("out/training_config.json").write_text(json.dumps(before), encoding="utf-8")
    assert settled() == "2026-11-24"
    assert settled("chat.date=2026-01-31") == "2026-01-31"
    assert settled(name="llama3") is None


def test_a_day_that_no_template_shows_or_that_is_none_is_refused(empty_folder):
    with pytest.raises(RecipeError, match="the chat template does not show the day; take it out"):
        settled("chat.date=2026-01-31", name="llama3")
    for wrong in ("2026-13-01", "20261125", "today"):
        with pytest.raises(RecipeError, match=f"found '?{re.escape(wrong)}'?; give a day as 2026-11-25"):
            settled(f"chat.date='{wrong}'")


def test_rows_that_were_tokenised_on_another_day_are_not_taken_from_the_cache(run):
    write("train.jsonl", talk("1", "2"))
    for day in ("2026-11-24", "2026-11-25"):
        data = run(f"chat.date={day}", tokenizer=tokenizer_for("gptoss"))
        assert f"Current date: {day}" in data.encoder.tokenizer.decode(data.train[0]["input_ids"])


def test_the_server_of_the_parity_proof_lives_on_the_day_of_the_run(tmp_path):
    tokenizer = tokenizer_for("gptoss")
    encoder = ChatEncoder(tokenizer, day="2026-11-24")
    rows = [("test.jsonl:7", Conversation([Q, A]))]
    encoder.encode([Q, A])
    save(tmp_path, tokenizer, sorted(encoder.stop_ids))
    assert prove_parity(tmp_path, encoder, rows)["prompts"] == 1
