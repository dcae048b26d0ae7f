"""A recipe of another tool becomes one of ours that says the same, or an error names the key that cannot."""

import json
from pathlib import Path

import pytest

import run_sft
from sft.errors import RecipeError
from sft.recipe import Source, load_recipe

ROWS = [
    {"instruction": "Twice 2?", "input": "", "output": "4."},
    {"instruction": "And 3?", "output": "6.", "history": [["Twice 2?", "4."]]},
]
LLAMAFACTORY = """\
model_name_or_path: m
stage: sft
do_train: true
finetuning_type: lora
lora_target: q_proj,v_proj
dataset: sums
template: qwen
quantization_bit: 4
val_size: 0.1
eval_strategy: steps
output_dir: saves/x
plot_loss: true
warmup_ratio: 0.1
bf16: true
"""
AXOLOTL = """\
base_model: m
datasets:
  - path: sums.jsonl
    type: chat_template
    field_messages: turns
    message_property_mappings: {role: who, content: text}
    roles_to_train: [assistant, user]
adapter: lora
lora_r: 4
lora_alpha: 8
lora_target_linear: true
micro_batch_size: 2
num_epochs: 2
evals_per_epoch: 2
val_set_size: 0.25
saves_per_epoch: 1
optimizer: adamw_torch_fused
learning_rate: 2e-4
flash_attention: true
"""
SWIFT = """\
# 22GB
n=2
NPROC_PER_NODE=$n \\
swift sft \\
    --model m \\
    --dataset 'a/b:main#500' \\
              'sums.jsonl' \\
    --tuner_type lora \\
    --target_modules q_proj v_proj \\
    --gradient_accumulation_steps $(expr 8 / $n) \\
    --system 'You are: brief.' \\
    --lr_scheduler_kwargs '{"min_lr": 1e-6}' --lr_scheduler_type cosine_with_min_lr \\
    --max_length 512

swift infer --model other
"""
TRL = """\
model_name_or_path: m
dataset_name: a/b
dataset_config: main
use_peft: true
load_in_4bit: true
torch_dtype: bfloat16
lora_target_modules: [q_proj]
packing: true
eval_strategy: epoch
eos_token: <|im_end|>
"""
HANDBOOK = """\
model_name_or_path: m
chat_template: "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
dataset_mixture:
  datasets:
    - {id: a/b, config: main, split: train_sft, columns: [messages, tools], weight: 0.5}
    - {id: a/c}
  test_split_size: 1000
eval_strategy: epoch
max_seq_length: 4096
learning_rate: 2.0e-05
beta: null
"""


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sums.json").write_text(json.dumps(ROWS), encoding="utf-8")
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    Path("data").mkdir()
    info = {"sums": {"file_name": "../sums.json"}, "votes": {"file_name": "v.json", "ranking": True}}
    info["seen"] = {"file_name": "s.json", "formatting": "sharegpt", "columns": {"images": "images"}}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    info["chats"] = {"hf_hub_url": "a/b", "formatting": "sharegpt", "columns": {"messages": "turns"}, "tags": tags}
    Path("data/dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def migrate(text, *overrides, name="other.yaml", model="nowhere/m", code=0):
    """The recipe that --from writes, read."""
    Path(name).write_text(text, encoding="utf-8")
    words = [f"model_name_or_path={model}", *overrides]
    assert run_sft.main(["--from", name, "mine.yaml", *words]) == code
    return load_recipe("mine.yaml") if code == 0 else None


def test_llamafactory_s_own_defaults_are_written_where_ours_differ(small_qwen):
    recipe = migrate(LLAMAFACTORY, model=str(small_qwen))
    assert recipe.lora_config == {"r": 8, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 16, "lora_dropout": 0.0}
    assert recipe.training_args == {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "gradient_accumulation_steps": 1,
        "eval_strategy": "steps",
    }
    assert recipe.quantization_config == {
        "load_in_4bit": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    assert recipe.dataset.train == (Source("data/../sums.json", "instruction"),)
    assert (recipe.dataset.validation, recipe.dataset.max_length, recipe.dataset.packing) == (0.1, 2048, False)
    assert recipe.output_dir == Path("output/mine")


def test_axolotl_s_data_sets_and_shares_of_an_epoch():
    recipe = migrate(AXOLOTL)
    assert recipe.dataset.train == (Source("sums.jsonl", "messages"),)
    assert recipe.dataset.columns == {"turns": "messages", "who": "role", "text": "content"}
    assert (recipe.dataset.validation, recipe.dataset.overlength, recipe.dataset.max_length) == (0.25, "drop", 512)
    assert recipe.lora_config == {"r": 4, "target_modules": "all-linear", "lora_alpha": 8, "lora_dropout": 0.0}
    args = recipe.training_args
    assert (args["per_device_train_batch_size"], args["gradient_accumulation_steps"]) == (2, 1)
    assert (args["eval_strategy"], args["eval_steps"], args["save_strategy"]) == ("steps", 0.25, "epoch")
    assert (args["lr_scheduler_type"], args["warmup_steps"], args["activation_checkpointing"]) == (
        "cosine",
        0.03,
        False,
    )


def test_a_script_of_ms_swift_is_read_without_a_shell(capsys):
    recipe = migrate(SWIFT, name="train.sh")
    assert recipe.dataset.train == (Source("a/b", subset="main"), Source("sums.jsonl"))
    assert (recipe.dataset.system, recipe.dataset.max_length) == ("You are: brief.", 512)
    assert recipe.lora_config == {
        "r": 8,
        "target_modules": ["q_proj", "v_proj"],
        "lora_alpha": 32,
        "lora_dropout": 0.05,
    }
    args = recipe.training_args
    assert args["gradient_accumulation_steps"] == 4 and args["lr_scheduler_kwargs"] == {"min_lr": 1e-6}
    assert (args["learning_rate"], args["weight_decay"], args["adam_beta2"]) == (1e-4, 0.1, 0.95)
    assert "eval_strategy" not in args  # nothing to validate on, there as here
    said = capsys.readouterr().out
    assert "line 6: dataset: a/b:main#500: all rows are used, not 500" in said
    assert "2 processes share a step there" in said and "without max_length" not in said


def test_trl_trains_float32_weights_unless_told_otherwise_and_nests_no_quantisation():
    recipe = migrate(TRL)
    assert recipe.model_init == {"dtype": "bfloat16"}
    assert migrate_again(TRL.replace("torch_dtype: bfloat16\n", "")).model_init == {"dtype": "float32"}
    assert recipe.quantization_config == {
        "load_in_4bit": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
    }
    assert recipe.dataset.train == (Source("a/b", subset="main"),)
    assert recipe.dataset.validation == (Source("a/b", subset="main", split="test"),)
    assert (recipe.dataset.max_length, recipe.dataset.packing) == (1024, "auto")
    assert recipe.lora_config == {"r": 16, "target_modules": ["q_proj"], "lora_alpha": 32, "lora_dropout": 0.05}


def test_an_upload_goes_over_where_it_names_a_user_and_is_switched_on(capsys):
    name = "hub_model_id: keeper/maren\n"
    export = migrate(TRL + name + "push_to_hub: true\nhub_private_repo: false\n").export
    assert (export.push_to_hub, export.private) == ("keeper/maren", False)
    for off in ("", "push_to_hub: false\n"):
        assert migrate_again(TRL + name + off).export.push_to_hub is None  # not pushed there either
    assert migrate_again(AXOLOTL + name).export.push_to_hub == "keeper/maren"  # whose name alone uploads
    assert "push_to_hub" not in capsys.readouterr().out
    assert migrate_again(HANDBOOK + "push_to_hub: true\nhub_model_id: maren\n").export.push_to_hub is None
    assert "line 12: push_to_hub: set export.push_to_hub to user/name" in capsys.readouterr().out


def test_modelscope_stays_where_names_are_looked_up():
    assert migrate(SWIFT.replace("--max_length", "--use_hf false --max_length"), name="train.sh").hub == "modelscope"
    assert migrate_again(SWIFT.replace("NPROC", "USE_HF=0 NPROC"), name="train.sh").hub == "modelscope"
    assert migrate_again(SWIFT.replace("NPROC", "USE_HF=1 NPROC"), name="train.sh").hub == "huggingface"
    Path("sft.yaml").write_text(LLAMAFACTORY, encoding="utf-8")
    script = "export USE_MODELSCOPE_HUB=1\nllamafactory-cli train sft.yaml\n"
    assert migrate_again(script, name="train.sh").hub == "modelscope"


def test_lora_plus_and_early_stopping_go_over():
    more = "early_stopping_patience: 3\nloraplus_lr_ratio: 16\n"
    recipe = migrate(AXOLOTL + more)
    assert (recipe.loraplus_lr_ratio, recipe.early_stopping) == (16, {"early_stopping_patience": 3})
    recipe = migrate_again(AXOLOTL.replace("val_set_size: 0.25\n", "") + more)
    assert recipe.early_stopping is None  # there is nothing to validate on


def migrate_again(text, *overrides, **options):
    Path("mine.yaml").unlink()
    Path("mine.jinja").unlink(missing_ok=True)
    return migrate(text, *overrides, **options)


def test_alignment_handbook_s_mixture_and_template(capsys):
    recipe = migrate(HANDBOOK)
    assert recipe.dataset.train == (Source("a/b", weight=0.5, subset="main", split="train_sft"), Source("a/c"))
    assert recipe.dataset.validation == 0.02
    assert "# a share of the rows here, and 1,000 rows there" in Path("mine.yaml").read_text(encoding="utf-8")
    assert recipe.lora_config is None and recipe.training_args["learning_rate"] == 2e-5
    assert recipe.chat.template == "mine.jinja"
    assert Path("mine.jinja").read_text(encoding="utf-8").startswith("{% for message in messages %}{{ message")
    assert "a row's tools is not read" in capsys.readouterr().out


def test_every_key_without_a_counterpart_is_named_with_its_line_on_the_terminal_and_in_the_file(capsys):
    migrate(LLAMAFACTORY + "swanlab_mode: cloud\n")
    said, text = capsys.readouterr().out, Path("mine.yaml").read_text(encoding="utf-8")
    for line in ("line 7: template:", "line 12: plot_loss:", "line 15: swanlab_mode: is not known here"):
        assert f"\n  {line}" in said and f"\n# {line}" in text
    assert "bf16" not in said
    lines = text.splitlines()
    assert lines[0].startswith("# yaml-language-server: $schema=") and lines[0].endswith("sft/recipe/schema.json")
    assert lines[1] == "# python run_sft.py mine.yaml"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "finetuning_type: lora\nstage: dpo\n",
            "other.yaml:2: stage: found 'dpo', and what can be taken over is sft; ",
        ),
        (LLAMAFACTORY + "image_max_pixels: 9\n", "other.yaml:15: image_max_pixels: images, videos and sound are not"),
        (LLAMAFACTORY.replace(": sums", ": votes"), "other.yaml:6: dataset: votes: is of preferences (ranking)"),
        (LLAMAFACTORY.replace(": sums", ": seen"), "other.yaml:6: dataset: seen: has images; only text"),
        (LLAMAFACTORY + "dataset_dir: elsewhere\n", "'sums' is a name in elsewhere/dataset_info.json, which is not"),
        (LLAMAFACTORY + "learning_rate: fast\n", "other.yaml:15: learning_rate: found 'fast'; give a number"),
        (AXOLOTL + "rl: dpo\n", "other.yaml:20: rl: only supervised fine-tuning is done here"),
        (
            AXOLOTL.replace("chat_template", "completion"),
            "other.yaml:4: datasets[0].type: found 'completion'; what can",
        ),
        (AXOLOTL.replace("adamw_torch_fused", "muon"), "other.yaml:17: optimizer: found 'muon'; "),
        ("tuner_type: lora\nmodel: m\ntask_type: seq_cls\n", "other.yaml:3: task_type: found 'seq_cls', and what can"),
        (TRL + "dataset_text_field: text\n", "other.yaml:11: dataset_text_field: conversations are trained on here"),
        (HANDBOOK.replace("beta: null", "beta: 0.1"), "other.yaml:11: beta: only supervised fine-tuning is done here"),
        (TRL.replace("use_peft: true\n", ""), "no recipe of ours:\nquantization_config: quantised weights"),
        ("use_peft: true\n", "other.yaml: names no data (dataset_name, "),
        ("a: 1\n", "other.yaml: is of none of the tools that are read: Axolotl, LLaMA-Factory, alignment-handbook, "),
        ("dataset: {train: a}\n", "other.yaml: is a recipe of ours; run it: python run_sft.py other.yaml"),
    ],
)
def test_what_is_not_done_here_is_an_error_that_names_the_key_and_writes_nothing(text, problem, capsys):
    migrate(text, code=2)
    assert problem in capsys.readouterr().err
    assert not Path("mine.yaml").exists()


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (SWIFT.replace("512", "$(cat n)"), "train.sh:13: max_length: found $(cat, which only a shell knows"),
        ("swift rlhf --model m\n", "train.sh:1: found `swift rlhf`; only supervised fine-tuning is read"),
        ("trl dpo --config x.yaml\n", "train.sh:1: found `trl dpo`; only"),
        ("swift sft --model 'm\n", "train.sh:1: cannot be read as a command"),
    ],
)
def test_a_script_that_cannot_be_read_names_the_line(script, problem, capsys):
    migrate(script, name="train.sh", code=2)
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("text", [LLAMAFACTORY, AXOLOTL, TRL], ids=["LLaMA-Factory", "Axolotl", "trl"])
def test_nothing_of_a_script_is_run_and_the_model_s_own_code_is_never_allowed(text, capsys):
    assert migrate(text + "trust_remote_code: true\n").model_init.get("trust_remote_code") is None
    assert "trust_remote_code: the model's own code is not run" in capsys.readouterr().out
    Path("mine.yaml").unlink()
    migrate(SWIFT.replace("512", "$(touch ran)").replace("$n \\", "`touch ran` \\"), name="train.sh", code=2)
    assert not Path("ran").exists()


def test_a_script_that_names_a_yaml_file_is_read_with_it():
    Path("sft.yaml").write_text("model: m\ndataset: [sums.jsonl]\nlearning_rate: 3e-4\n", encoding="utf-8")
    recipe = migrate("swift sft sft.yaml --lora_rank 4\n", name="train.sh")
    assert (recipe.training_args["learning_rate"], recipe.lora_config["r"]) == (3e-4, 4)


def test_speakers_and_columns_of_dataset_info_are_taken_over():
    recipe = migrate(LLAMAFACTORY.replace(": sums", ": chats"))
    assert recipe.dataset.train == (Source("a/b", "messages"),)
    assert recipe.dataset.columns == {"turns": "messages"}


def test_data_sets_with_other_names_of_their_columns_keep_them_each():
    recipe = migrate(LLAMAFACTORY.replace(": sums", ": sums,chats"))
    assert recipe.dataset.train == (
        Source("data/../sums.json", "instruction"),
        Source("a/b", "messages", columns={"turns": "messages"}),
    )


def test_nothing_is_overwritten_neither_a_recipe_nor_a_template(capsys):
    Path("mine.yaml").write_text("mine", encoding="utf-8")
    migrate(TRL, code=2)
    assert "mine.yaml: is there already, and nothing is overwritten" in capsys.readouterr().err
    Path("mine.yaml").unlink()
    Path("mine.jinja").write_text("mine", encoding="utf-8")
    migrate(HANDBOOK, code=2)
    assert "mine.jinja: is there already" in capsys.readouterr().err
    assert not Path("mine.yaml").exists() and Path("mine.jinja").read_text(encoding="utf-8") == "mine"


def test_the_command_line_wins_over_the_other_recipe():
    recipe = migrate(LLAMAFACTORY, "dataset.train=sums.jsonl", "training_args.learning_rate=1e-3", "lora_config.r=2")
    assert recipe.dataset.train == (Source("sums.jsonl"),)
    assert (recipe.training_args["learning_rate"], recipe.lora_config["r"]) == (1e-3, 2)


HEAD = r"<|im_start|>system\nYou are Qw ... end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        (LLAMAFACTORY, r"[[4.<|im_end|>]]{+\n+}", r"[[6.<|im_end|>]]{+\n+}"),
        (LLAMAFACTORY + "mask_history: true\n", r"[[4.<|im_end|>]]{+\n+}", HEAD + r"[[6.<|im_end|>]]{+\n+}"),
        ("tuner_type: lora\nmodel: m\ndataset: sums.jsonl\n", r"[[4.<|im_end|>]]{+\n+}", r"[[4.]]{-<|im_end|>-}\n"),
        (LLAMAFACTORY + "train_on_prompt: true\n", "{+<|im_start|>system", r"[[4.<|im_end|>]]{+\n"),
    ],
    ids=["LLaMA-Factory", "mask_history", "ms-swift", "train_on_prompt"],
)
def test_two_rows_show_where_the_other_tool_s_labels_differ(text, first, second, small_qwen, capsys):
    migrate(text, model=str(small_qwen))
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("labels: [[ ]] trained on in both"))
    assert lines[start + 1].startswith(("data/../sums.json:", "sums.jsonl:1"))
    assert first in lines[start + 2] and second in lines[start + 4]


def test_the_page_shows_what_is_printed(small_qwen, capsys):
    migrate("tuner_type: lora\nmodel: m\ndataset: a/b\n", model=str(small_qwen))
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("labels: "))
    page = (Path(__file__).resolve().parents[2] / "docs" / "coming_from.md").read_text(encoding="utf-8")
    assert f"{lines[start].removeprefix('labels: ')}\n{lines[start + 4]}\n" in page


def test_labels_that_are_the_same_are_said_to_be_so(small_qwen, capsys):
    migrate(AXOLOTL.replace("chat_template\n", "alpaca\n"), model=str(small_qwen))
    assert "labels: on the first rows the same tokens as in Axolotl" in capsys.readouterr().out


def test_without_the_model_the_recipe_is_written_and_it_is_said_why_no_rows_are_shown(capsys):
    migrate(AXOLOTL, model="./nowhere")
    assert "(no rows are shown: mine.yaml:" in capsys.readouterr().out


def test_a_migrated_recipe_passes_check(small_qwen):
    migrate(LLAMAFACTORY.replace("val_size: 0.1\n", ""), model=str(small_qwen))
    assert run_sft.main(["mine.yaml", "--check", "quantization_config=null"]) == 0


@pytest.mark.parametrize(
    ("name", "text", "tool"),
    [
        ("a.yaml", LLAMAFACTORY, "LLaMA-Factory"),
        ("a.yaml", AXOLOTL, "Axolotl"),
        ("a.sh", SWIFT, "ms-swift"),
        ("a.yaml", TRL, "trl"),
        ("a.yaml", HANDBOOK, "alignment-handbook"),
    ],
)
def test_a_recipe_of_another_tool_is_answered_with_the_command_to_type(name, text, tool):
    Path(name).write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    command = f"python run_sft.py --from {name} recipes/a.yaml"
    assert str(caught.value) == f"{name}: seems to be a recipe of {tool}; to write ours from it: {command}"
