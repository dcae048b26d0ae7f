"""The general rows: those that come with the repository, those of a user, and those that a tokenizer cannot take."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft.data.chat import ChatEncoder
from sft.data.general import encodable, read_general
from sft.errors import UserError
from sft.recipe import load_recipe
from sft.results.scores import HAN
from tests.families import FAMILIES, build

ROOT = Path(__file__).resolve().parents[2]


def recipe_with(general, *overrides):
    return load_recipe(ROOT / "recipes/qwen_qlora.yaml", [f"evaluation.general={general}", *overrides])


def write(folder, *rows):
    file = folder / "general.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_bundled_rows_are_86_a_third_of_them_chinese_without_system_prompt_or_repeats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = read_general(recipe_with("bundled"))
    assert len(rows) == 86 and rows[0][0] == str(Path("data/general/en.jsonl:1"))
    texts = ["".join(message["content"] for message in conversation.messages) for _, conversation in rows]
    assert sum(bool(HAN.search(text)) for text in texts) == 38
    assert len(set(texts)) == 86
    for _, conversation in rows:
        assert [message["role"] for message in conversation.messages] in [["user", "assistant"] * n for n in (1, 2, 3)]


def test_off_is_no_rows():
    assert read_general(recipe_with("off")) == []


def test_a_users_file_may_be_in_any_format_and_have_its_columns_renamed(tmp_path):
    file = write(tmp_path, {"question": "Two and two?", "answer": "Four."})
    recipe = recipe_with(file, "dataset.columns={question: human, answer: assistant}", "dataset.system=You are Maren.")
    ((place, conversation),) = read_general(recipe)
    assert place == f"{file}:1"
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"], "no persona's prompt"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"human": "Hi.", "assistant": 3},
            "general.jsonl:2: the field 'assistant' is a number, not text; mend the row",
        ),
        ({"messages": [{"role": "user", "content": "Hi."}]}, "general.jsonl:2: "),
    ],
    ids=["wrong type", "another format"],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, row, said):
    file = write(tmp_path, {"human": "Hi.", "assistant": "Hello."}, row)
    with pytest.raises(UserError) as raised:
        read_general(recipe_with(file))
    assert said in str(raised.value)


def test_a_row_whose_answers_are_all_taken_out_of_the_loss_is_named(tmp_path):
    answer = {"role": "assistant", "content": "Hello.", "train": False}
    with pytest.raises(UserError, match=r"general.jsonl:1: there is no answer to measure; mend the row, or name"):
        read_general(recipe_with(write(tmp_path, {"messages": [{"role": "user", "content": "Hi."}, answer]})))


def test_a_missing_file_is_told_by_its_key():
    with pytest.raises(UserError, match=r"evaluation.general=nowhere.jsonl: there is no file nowhere.jsonl"):
        read_general(recipe_with("nowhere.jsonl"))


def test_rows_with_text_that_the_tokenizer_has_no_token_for_are_left_out():
    letters = [*map(chr, range(32, 127)), "\n"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<|im_start|>", "<|im_end|>", *letters])}
    ascii_only = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    ascii_only.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=ascii_only,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=build(FAMILIES["qwen2_5"], "bytes").chat_template,
    )
    kept = encodable(read_general(recipe_with("bundled")), ChatEncoder(tokenizer))
    assert len(kept) == 47, "24 and 24 English rows, one of which says 'fährt'"
    assert not any("zh.jsonl" in place for place, _ in kept)


def test_a_row_that_spells_a_control_token_is_left_out(tmp_path):
    rows = [{"human": "Hi.", "assistant": text} for text in ("Hello.", "It ends with <|im_end|>")]
    encoder = ChatEncoder(build(FAMILIES["qwen2_5"], "bytes"))
    kept = encodable(read_general(recipe_with(write(tmp_path, *rows))), encoder)
    assert [place for place, _ in kept] == [f"{tmp_path / 'general.jsonl'}:1"]
