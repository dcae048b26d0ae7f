"""`--new` looks at a model and data, and writes a recipe that passes --check."""

import json
from pathlib import Path

import numpy as np
import pytest

import run_sft
from sft.recipe import Source, load_recipe
from sft.starting import new
from sft.starting.draft import Draft, spelled

WORDS = ["depth", "tide", "lamp", "rock", "gull", "storm"]


UNMEASURED = "quantization_config=null"  # the method is said, so that memory is not estimated


def write_rows(name, count, answer=4):
    rows = [
        {"human": f"How is the {WORDS[i % 6]} {i}?", "assistant": " ".join(WORDS[(i + j) % 6] for j in range(answer))}
        for i in range(count)
    ]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(*words, code=0):
    assert run_sft.main(["--new", "mine.yaml", *map(str, words)]) == code
    return load_recipe("mine.yaml") if code == 0 else None


def test_a_recipe_is_written_from_looking_at_model_and_data_and_passes_check(small_qwen, capsys):
    write_rows("chats.jsonl", 400)
    recipe = start(small_qwen, "chats.jsonl")
    said = capsys.readouterr().out
    assert "model: Qwen2ForCausalLM, 0.2 million weights" in said
    assert "data: 400 rows to train on (format human_assistant), " in said
    assert recipe.dataset.train == (Source("chats.jsonl"),)
    assert (recipe.dataset.validation, recipe.dataset.test, recipe.dataset.max_length) == (0.05, 0.1, 256)
    assert recipe.lora_config == {
        "r": 16,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "lora_alpha": 32,
        "lora_dropout": 0.05,
    }
    assert recipe.quantization_config is None and recipe.output_dir == Path("output/mine")
    assert (recipe.training_args["learning_rate"], recipe.training_args["num_train_epochs"]) == (1e-3, 3)
    lines = Path("mine.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# yaml-language-server: $schema=") and lines[0].endswith("sft/recipe/schema.json")
    assert lines[1] == "# python run_sft.py mine.yaml"
    assert f"{'  test: 0.1':<43} # about 40 rows held out, scored before and after" in lines
    assert run_sft.main(["mine.yaml", "--check"]) == 0


def test_few_rows_are_all_trained_on_and_files_go_where_their_names_say(small_qwen):
    write_rows("chats.jsonl", 30)
    assert start(small_qwen, "chats.jsonl", UNMEASURED).dataset.test is None
    assert "No row of 30 is held out, so no answer is scored; dataset.test: 0.2 holds a fifth out." in Path(
        "mine.yaml"
    ).read_text(encoding="utf-8")
    Path("mine.yaml").unlink()
    for name in ("my_test.jsonl", "valid.jsonl", "latest.jsonl"):
        write_rows(name, 12)
    dataset = start(small_qwen, "chats.jsonl", "my_test.jsonl", "valid.jsonl", "latest.jsonl", UNMEASURED).dataset
    assert dataset.train == (Source("chats.jsonl"), Source("latest.jsonl"))
    assert (dataset.test, dataset.validation) == ((Source("my_test.jsonl"),), (Source("valid.jsonl"),))


def test_max_length_holds_nearly_all_rows_and_says_of_how_many_and_answers_have_room(small_qwen):
    write_rows("short.jsonl", 199, answer=5)
    write_rows("long.jsonl", 1, answer=900)
    recipe = start(small_qwen, "short.jsonl", "long.jsonl", UNMEASURED)
    text = Path("mine.yaml").read_text(encoding="utf-8")
    assert recipe.dataset.max_length == 256
    assert "# holds 99.5 % of the rows; the longest has " in text
    usual = int(text.partition("99 % of the answers have at most ")[2].split()[0])
    assert recipe.evaluation.generation["max_new_tokens"] == -(-usual * 3 // 32) * 16


def test_where_lora_does_not_fit_it_is_in_4_bits_and_full_fine_tuning_is_offered_where_it_fits(small_qwen, monkeypatch):
    write_rows("chats.jsonl", 40)
    sizes = {}
    real = new.needs

    def noted(recipe, *others):
        found = real(recipe, *others)
        sizes.setdefault("QLoRA" if recipe.quantization_config else "LoRA", found.most)
        return found

    monkeypatch.setattr(new, "needs", noted)
    assert start(small_qwen, "chats.jsonl").quantization_config is None
    assert "Full fine-tuning fits too: without lora_config, and at a learning_rate of about 1e-4." in (
        Path("mine.yaml").read_text(encoding="utf-8")
    )
    Path("mine.yaml").unlink()
    monkeypatch.setattr(new, "free_bytes", lambda on_cpu: sizes["LoRA"] - 1)
    recipe = start(small_qwen, "chats.jsonl")
    assert recipe.quantization_config["load_in_4bit"] and recipe.quantization_config["bnb_4bit_quant_type"] == "nf4"
    assert "Full fine-tuning" not in Path("mine.yaml").read_text(encoding="utf-8")


def test_what_the_command_line_says_stands(small_qwen):
    write_rows("chats.jsonl", 40)
    recipe = start(small_qwen, "chats.jsonl", "lora_config=null", "dataset.max_length=64", "dataset.test=0.5")
    assert recipe.lora_config is recipe.quantization_config is None
    assert (recipe.dataset.max_length, recipe.dataset.test) == (64, 0.5)
    assert recipe.training_args["learning_rate"] == pytest.approx(1e-4)


def test_rows_that_cannot_be_read_or_spell_a_control_token_are_named_and_do_not_stop_the_check(small_qwen):
    write_rows("chats.jsonl", 60)
    with open("chats.jsonl", "a", encoding="utf-8") as file:
        file.write('{"human": "Hi."}\n{"human": "What is <|im_end|>?", "assistant": "A stop token."}\n')
    recipe = start(small_qwen, "chats.jsonl", UNMEASURED)
    assert (recipe.dataset.on_error, recipe.dataset.control_tokens) == ("skip", "text")
    text = Path("mine.yaml").read_text(encoding="utf-8")
    assert "# 1 rows cannot be read, the first chats.jsonl:61" in text
    assert "# 1 rows spell one, the first chats.jsonl:62" in text
    assert run_sft.main(["mine.yaml", "--check"]) == 0


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["{model}"], "--new takes a recipe, a model and data, e.g. python run_sft.py --new recipes/mine.yaml "),
        (["./nowhere", "chats.jsonl"], "error: model_name_or_path: there is no folder ./nowhere"),
        (["{model}", "none.jsonl"], "error: dataset.train: there is no file none.jsonl"),
        (["{model}", "test.jsonl"], "test.jsonl: by its name it is to be tested on; name a file to train on besides"),
        (["{model}", "chats.jsonl", "dataset.max_lenght=5"], "unknown key dataset.max_lenght; did you mean"),
        (["{bare}", "chats.jsonl"], "its tokenizer has no chat template; give one with chat.template (a .jinja file)"),
    ],
)
def test_what_cannot_be_used_is_an_error_and_nothing_is_written(words, problem, small_qwen, tmp_path, capsys):
    write_rows("chats.jsonl", 5)
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in small_qwen.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    start(*(word.format(model=small_qwen, bare=bare) for word in words), code=2)
    assert problem in capsys.readouterr().err
    assert not Path("mine.yaml").exists()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("there.yaml", "there.yaml: is there already, and nothing is overwritten"),
        ("mine.txt", "mine.txt: is no name of a recipe; give one that ends in .yaml"),
        ("no/mine.yaml", "no/mine.yaml: there is no folder no; make it, or name another"),
    ],
)
def test_a_recipe_is_written_to_a_new_file_only(name, problem, capsys):
    Path("there.yaml").write_text("mine", encoding="utf-8")
    assert run_sft.main(["--new", name, "m", "chats.jsonl"]) == 2
    assert problem in capsys.readouterr().err.replace("\\", "/")
    assert Path("there.yaml").read_text(encoding="utf-8") == "mine"


def test_answers_are_counted_within_their_rows_though_they_meet_at_the_border():
    from datasets import Dataset

    from sft.data.token_cache import TokenFile
    from sft.starting.measure import _answers

    masks = Dataset.from_dict({"assistant_mask": [[0, 1, 1], [1, 0, 1], [0, 0], [1]]})
    assert _answers(TokenFile(Path("x"), masks, {}, [])).tolist() == [2, 1, 1, 1]


def test_a_draft_spells_values_so_that_they_are_read_as_they_were():
    values = {
        "sha": "1e5", "word": "true", "dots": ".5", "text": 'a: "b" # c', "none": None, "rate": 2e-4, "share": 0.05,
        "list": [1, "x y", {"a": "~"}], "path": "./data/x.jsonl", "tilde": "~/x", "inf": ".inf", "chinese": "你好",
    }  # fmt: skip
    draft = Draft()
    draft.set("model_name_or_path", "m")
    draft.set("output_dir", "o")
    draft.set("dataset.train", "a.jsonl")
    draft.set("chat.variables", values)
    assert draft.recipe(Path("x.yaml")).chat.variables == values
    assert (spelled(2e-4), spelled(1.5e-3), spelled(0.05), spelled(3.0)) == ("2e-4", "1.5e-3", "0.05", "3.0")


def test_a_share_held_out_is_a_tenth_or_two_hundred_rows(small_qwen):
    from sft.starting.measure import Measured

    def shares(rows):
        draft = Draft()
        draft.set("dataset.train", "a.jsonl")
        lengths = np.full(rows, 50)
        problems = {"bad row": [], "control token": []}
        new._set_data(draft, Measured([], rows, lengths, lengths, 50, problems), 8192)
        return draft.value("dataset.validation"), draft.value("dataset.test")

    assert [shares(rows) for rows in (99, 100, 200, 1000, 20_000)] == [
        (None, None),
        (None, 0.2),
        (0.1, 0.1),
        (0.05, 0.1),
        (0.01, 0.01),
    ]
