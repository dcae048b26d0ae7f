"""What a user can get wrong: one clear answer, exit code 2, no traceback, nothing left behind."""

import json
from pathlib import Path

import pytest

import run_sft

ROOT = Path(__file__).resolve().parent.parent
GOOD = json.dumps({"conversation": [{"human": "Hi.", "assistant": "Hello."}]})
RECIPE = """
model_name_or_path: {model}
output_dir: {folder}/out
dataset:
  train: {folder}/train.jsonl
lora_config: {{r: 4, target_modules: [q_proj, v_proj]}}
training_args: {{max_steps: 1, per_device_train_batch_size: 1}}
"""


def lines(*rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


# name: (bytes of train.jsonl or None, overrides, what the answer must say)
CASES = {
    "missing file": (None, [], "there is no file"),
    "misspelt file": (GOOD.encode(), ["dataset.train=./trian.jsonl"], "); did you mean 'train.jsonl'?"),
    "a share in percent": (
        GOOD.encode(),
        ["dataset.test=20%"],
        "dataset.test=20%: found '20%'; a share is written as 0.2",
    ),
    "empty file": (b"", [], "is empty"),
    "only blank lines": (b"\n\n", [], "is empty"),
    "directory": ("directory", [], "is a directory"),
    "bad JSON on line 3": (lines(GOOD, GOOD, '{"conversation": [').encode(), [], "train.jsonl:3: is not JSON"),
    "UTF-16": (GOOD.encode("utf-16"), [], "is UTF-16"),
    "GBK": (lines({"conversation": [{"human": "你好", "assistant": "好"}]}).encode("gbk"), [], "is not UTF-8"),
    "lone surrogate": (b'{"conversation": [{"human": "\\ud800", "assistant": "b"}]}\n', [], "surrogate"),
    "a JSON text": (b'"hello"\n', [], "no format fits"),
    "a number": (b"17\n", [], "no format fits"),
    "no known field": (
        lines({"text": "a", "label": "b"}).encode(),
        [],
        "fits the fields text, label; docs/formats.md shows",
    ),
    "other names of fields": (
        lines({"question": "a", "answer": "b"}).encode(),
        [],
        "if it is meant to be human_assistant, set dataset.columns: {question: human, answer: assistant}",
    ),
    "other names in a turn": (
        lines({"conversation": [{"user": "a", "assistant": "b"}]}).encode(),
        [],
        "the question of turn 1 (human) is missing; the turn has user, assistant",
    ),
    "Chinese names of fields": (
        lines({"问题": "a", "答案": "b"}).encode(),
        [],
        "if it is meant to be human_assistant, set dataset.columns: {问题: human, 答案: assistant}",
    ),
    "one other name of two": (
        lines({"prompt": "a", "answer": "b"}).encode(),
        [],
        "if it is meant to be prompt_completion, set dataset.columns: {answer: completion}",
    ),
    "a misspelt key in a turn": (
        lines({"conversation": [{"humen": "a", "assistant": "b"}]}).encode(),
        [],
        "has humen, assistant; if these are other names, set dataset.columns: {humen: human}",
    ),
    "the keys of messages in sharegpt": (
        lines({"conversations": [{"role": "user", "content": "a"}]}).encode(),
        [],
        "if these are other names, set dataset.columns: {role: from, content: value}",
    ),
    "a row's last brace": (GOOD[:-1].encode() + b"\n", [], "at column 59, the row's end; is its last } or ] missing?"),
    "missing answer": (lines({"conversation": [{"human": "a"}]}).encode(), [], "turn 1 (assistant) is missing"),
    "wrong type": (lines({"conversation": "a"}).encode(), [], "'conversation' is text, not a list"),
    "answer is a number": (lines({"conversation": [{"human": "a", "assistant": 3}]}).encode(), [], "is int, not text"),
    "empty answer": (lines({"conversation": [{"human": "a", "assistant": " "}]}).encode(), [], "turn 1 is empty"),
    "empty conversation": (lines({"conversation": []}).encode(), [], "the conversation is empty"),
    "no assistant": (lines({"messages": [{"role": "user", "content": "a"}]}).encode(), [], "no assistant message"),
    "unknown role": (lines({"messages": [{"role": "bot", "content": "a"}]}).encode(), [], "is 'bot'; known are"),
    "mixed schemas": (lines(GOOD, {"instruction": "a", "output": "b"}).encode(), [], "train.jsonl:2: the field 'conv"),
    "control token": (
        lines({"conversation": [{"human": "<|im_end|>", "assistant": "b"}]}).encode(),
        [],
        "spells the control token '<|im_end|>'",
    ),
    "over-long row": (
        GOOD.encode(),
        ["dataset.max_length=3", "dataset.overlength=error"],
        "more than dataset.max_length",
    ),
    "everything dropped": (
        GOOD.encode(),
        ["dataset.max_length=3", "dataset.overlength=drop"],
        "no row of dataset.train",
    ),
    "wrong format named": (GOOD.encode(), ["dataset.format=instruction"], "'instruction' is missing"),
    "unknown format": (GOOD.encode(), ["dataset.format=alpacca"], "alpacca"),
    "unknown key": (GOOD.encode(), ["dataset.max_lenght=3"], "did you mean 'max_length'?"),
    "wrong value type": (GOOD.encode(), ["training_args.learning_rate=fast"], "learning_rate"),
    "wrong choice": (GOOD.encode(), ["training_args.lr_scheduler_type=cosin"], "cosine"),
    "no such model": (GOOD.encode(), ["model_name_or_path=./nosuch"], "there is no folder ./nosuch"),
    "a misspelt model": (
        GOOD.encode(),
        [f"model_name_or_path={ROOT.parent}/{ROOT.name}/dta"],
        f"; did you mean '{ROOT}/data'?",
    ),
    "a folder that is no model": (GOOD.encode(), [f"model_name_or_path={ROOT}/data"], "holds no config.json"),
    "no such adapter": (GOOD.encode(), ["adapter_name_or_path=./nosuch"], "there is no folder ./nosuch"),
    "no such target module": (GOOD.encode(), ["lora_config.target_modules=[query]"], "has no module query"),
    "no such checkpoint": (GOOD.encode(), ["resume_from_checkpoint=./checkpoint-7"], "there is no checkpoint"),
    "no such template": (
        GOOD.encode(),
        ["chat.template=nosuch.jinja"],
        "there is no file nosuch.jinja; a template is given as a file",
    ),
    "unwritable output": (GOOD.encode(), ["output_dir=/proc/out"], "/proc/out"),
    "output is a file": (GOOD.encode(), [f"output_dir={ROOT}/LICENSE/out"], "LICENSE/out"),
    "glob without a match": (GOOD.encode(), ["dataset.train=nosuch/*.jsonl"], "no file matches"),
    "flash attention without a GPU": (
        GOOD.encode(),
        ["model_init.attn_implementation=flash_attention_2"],
        "needs a GPU",
    ),
    "fp16 without a GPU": (GOOD.encode(), ["training_args.fp16=true"], "needs a GPU"),
    "a reporter that is not there": (GOOD.encode(), ["training_args.report_to=wandb"], "pip install wandb"),
    "liger kernels that are not there": (
        GOOD.encode(),
        ["training_args.use_liger_kernel=true"],
        "liger is not installed; run: pip install liger-kernel",
    ),
    "hub kernels without their package": (
        GOOD.encode(),
        ["model_init.use_kernels=true"],
        'needs the package kernels; run: pip install "kernels>=',
    ),
    "an attention of the hub without the package": (
        GOOD.encode(),
        ["model_init.attn_implementation=kernels-community/flash-attn"],
        'needs the package kernels; run: pip install "kernels>=',
    ),
    "DeepSpeed that is not there": (
        GOOD.encode(),
        ["training_args.deepspeed={zero_optimization: {stage: 3}}"],
        "deepspeed is not installed; run: pip install deepspeed",
    ),
    "an optimizer that is not there": (GOOD.encode(), ["training_args.optim=galore_adamw"], "install `galore_torch`"),
    "an optimizer of another machine": (
        GOOD.encode(),
        ["training_args.optim=adamw_torch_npu_fused"],
        "failed to import FusedAdamW from torch_npu",
    ),
    "a second handler of SIGTERM": (
        GOOD.encode(),
        ["training_args.enable_jit_checkpoint=true"],
        "a run that gets SIGTERM saves a checkpoint anyway; remove it",
    ),
    "quantised full fine-tuning": (
        GOOD.encode(),
        ["lora_config=null", "quantization_config={load_in_4bit: true}"],
        "quantised weights cannot be trained",
    ),
    "a quantised module trained whole": (
        GOOD.encode(),
        ["lora_config.modules_to_save=[o_proj]", "quantization_config={load_in_4bit: true}"],
        "o_proj is quantised, and quantised weights cannot be trained; name it in target_modules",
    ),
    "no such metric": (GOOD.encode(), ["evaluation.metrics=[blue]"], "blue"),
    "advice to who typed the key": (
        GOOD.encode(),
        ["evaluation.model=final", "export.merge=false"],
        "override evaluation.model=final: final needs export.merge=true, which writes final_model/",
    ),
    "one metric": (GOOD.encode(), ["evaluation.metrics=bleu"], "metrics=bleu: found 'bleu'; write [bleu]"),
    "a share that holds nothing back": (GOOD.encode(), ["dataset.validation=0.5"], "holds out every row"),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_gets_one_clear_answer(name, small_qwen, tmp_path, capfd, monkeypatch):
    content, overrides, said = CASES[name]
    monkeypatch.chdir(tmp_path)
    if content == "directory":
        (tmp_path / "train.jsonl").mkdir()
    elif content is not None:
        (tmp_path / "train.jsonl").write_bytes(content)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=small_qwen, folder=tmp_path), encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    assert run_sft.main([str(recipe), *overrides]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("error: ") and said in captured.err, captured.err
    assert "Traceback" not in captured.err
    assert sorted(tmp_path.iterdir()) == before, "something was left behind"


def refused(small_qwen, tmp_path, capfd, *rows):
    """What is said of these rows, line by line."""
    (tmp_path / "train.jsonl").write_text(lines(*rows), encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=small_qwen, folder=tmp_path), encoding="utf-8")
    assert run_sft.main([str(recipe)]) == 2
    return capfd.readouterr().err.removeprefix("error: ").replace(f"{tmp_path}/", "").splitlines()


def test_a_problem_that_many_rows_have_is_said_once_with_the_first_three(small_qwen, tmp_path, capfd):
    empty = {"conversation": []}
    assert refused(small_qwen, tmp_path, capfd, GOOD, *["{"] * 3, empty, "{", empty, "7") == [
        "train.jsonl:2: is not JSON: Expecting property name enclosed in double quotes at column 2; write each row in "
        "one line (in 4 rows: 2, 3, 4, ...)",
        "train.jsonl:5: the conversation is empty (in 2 rows: 5, 7)",
        "train.jsonl:8: the row is a number, not an object",
        "mend the 7 rows; or set dataset.on_error: skip",
    ]


def test_who_would_skip_every_row_is_not_advised_to(small_qwen, tmp_path, capfd):
    said = refused(small_qwen, tmp_path, capfd, *[{"question": "a", "answer": "b"}] * 25)
    assert said[0].endswith("set dataset.columns: {question: human, answer: assistant} (in 25 rows: 1, 2, 3, ...)")
    whole = "no row of a file can be used: mend the file, or say how it is read (dataset.columns, dataset.format)"
    assert said[1:] == [whole]


def test_different_problems_are_named_up_to_twenty_then_counted(small_qwen, tmp_path, capfd):
    said = refused(small_qwen, tmp_path, capfd, GOOD, *['{"a": ' + "[" * i for i in range(25)])
    assert [line.partition(": ")[0] for line in said[:20]] == [f"train.jsonl:{i}" for i in range(2, 22)]
    assert said[20:] == ["... and 5 more", "mend the 25 rows; or set dataset.on_error: skip"]


def test_a_run_from_another_folder_is_told_where_recipe_model_and_data_are(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("model_name_or_path: ./data\noutput_dir: o\ndataset_path: data/demo/x.jsonl\n")
    assert run_sft.main(["recipes/smollm2_cpu.yaml"]) == 2
    assert run_sft.main(["mine.yaml"]) == 2
    where = f"it is in {ROOT}: run the command from there"
    assert [where in line for line in capfd.readouterr().err.splitlines()] == [True, True]


def test_path_beside_the_recipe_is_pointed_at(small_qwen, tmp_path, capfd, monkeypatch):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "train.jsonl").write_text(lines(GOOD), encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        RECIPE.format(model=small_qwen, folder=tmp_path).replace(f"{tmp_path}/train", "train"), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    assert run_sft.main(["recipes/recipe.yaml"]) == 2
    said = capfd.readouterr().err
    assert f"; it is in {folder}: run the command from there" in said
    assert said.startswith("error: recipes/recipe.yaml:5: dataset.train")
