"""A recipe loads as its text says, and a wrong one is answered with the place, the finding and the mending."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sft.errors import RecipeError
from sft.recipe import DatasetOptions, ExportOptions, Recipe, Source, load_recipe
from tests.seeds import FLAT_SEED, NESTED_SEED

LEAST = "model_name_or_path: m\ndataset_path: a.jsonl\noutput_dir: out\n"
NESTED_LEAST = "model: {base_model_path: m, output_dir: out}\ndataset: {train_path: a.jsonl}\n"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> Recipe:
    Path("x.yaml").write_text(text, encoding="utf-8")
    return load_recipe("x.yaml", overrides)


def problems(text: str | bytes, *overrides: str) -> list[str]:
    Path("x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe("x.yaml", overrides)
    return str(caught.value).split("\n")


def test_the_flat_seed_loads_as_printed() -> None:
    recipe = load(FLAT_SEED)
    assert recipe.model_name_or_path == "Qwen/Qwen2.5-7B-Instruct"
    assert recipe.dataset == DatasetOptions(train=(Source("dataset/novel_finetuning_dataset.jsonl"),))
    assert recipe.output_dir == Path("output/qwen_qlora_model")
    assert recipe.resume_from_checkpoint is True
    assert recipe.quantization_config == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": True,
    }
    assert recipe.lora_config == {
        "r": 32,
        "lora_alpha": 64,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "bias": "none",
    }
    assert recipe.training_args == {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 0.0002,
        "logging_steps": 10,
        "save_steps": 100,
    }


def test_the_nested_seed_means_what_its_text_says() -> None:
    recipe = load(NESTED_SEED)
    assert recipe.model_name_or_path == "THUDM/chatglm3-6b"
    assert recipe.output_dir == Path("../model")
    assert recipe.dataset == DatasetOptions(
        train=(Source("../dataset/moemuu/train.jsonl"),), validation=(Source("../dataset/moemuu/test.jsonl"),)
    )
    assert recipe.quantization_config == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    assert recipe.lora_config == {
        "r": 8,
        "lora_alpha": 32,
        "target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    }
    assert recipe.training_args == {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "learning_rate": 2e-05,
    }


def test_nested_flags_choose_eight_bits_and_full_fine_tuning() -> None:
    assert load(NESTED_SEED, "model.use_4bit=false", "model.use_8bit=true").quantization_config == {
        "load_in_8bit": True
    }
    full = load(NESTED_SEED, "model.use_4bit=false", "lora.use_lora=false")
    assert (full.quantization_config, full.lora_config) == (None, None)
    assert load(NESTED_LEAST).lora_config is None


def test_a_nested_file_takes_the_flat_sections_it_has_no_word_for() -> None:
    text = NESTED_LEAST + "model_init: {dtype: float32}\nexport: {merge: false}\nevaluation: {batch_size: 4}\n"
    recipe = load(text, "dataset.packing=false", "dataset.test=t.jsonl", "resume_from_checkpoint=false")
    assert recipe.model_init == {"dtype": "float32"}
    assert recipe.export == ExportOptions(merge=False)
    assert recipe.evaluation.batch_size == 4
    assert recipe.dataset.packing is False
    assert recipe.dataset.test == (Source("t.jsonl"),)
    assert recipe.resume_from_checkpoint is False


def test_defaults_are_the_documented_ones() -> None:
    assert load(LEAST).to_dict() == {
        "model_name_or_path": "m",
        "hub": "huggingface",
        "adapter_name_or_path": None,
        "output_dir": "out",
        "resume_from_checkpoint": True,
        "model_init": {},
        "dataset": {
            "train": [{"path": "a.jsonl", "format": "auto", "weight": 1.0, "subset": None, "split": None}],
            "validation": None,
            "test": None,
            "format": "auto",
            "system": None,
            "max_length": 2048,
            "overlength": "trim",
            "on_error": "error",
            "control_tokens": "error",
            "max_lost": 0.05,
            "packing": "auto",
            "columns": None,
            "near_duplicates": "report",
            "cache_gb": 20,
            "num_proc": None,
            "streaming": False,
        },
        "chat": {
            "template": None,
            "variables": {},
            "date": None,
            "examples": "auto",
            "loss_on": "all_turns",
            "response_template": None,
            "instruction_template": None,
        },
        "quantization_config": None,
        "lora_config": None,
        "loraplus_lr_ratio": None,
        "training_args": {},
        "early_stopping": None,
        "evaluation": {
            "metrics": ["bleu", "chrf", "rouge"],
            "model": "adapter",
            "batch_size": 16,
            "max_samples": None,
            "every": None,
            "during_samples": 64,
            "general": "bundled",
            "language": None,
            "generation": {"max_new_tokens": 256},
        },
        "export": {"merge": True, "format": None, "push_to_hub": None, "private": True},
    }


@pytest.mark.parametrize("text", [FLAT_SEED, NESTED_SEED, LEAST + "model_init: {max_memory: {0: 10GiB, cpu: 30GiB}}\n"])
def test_a_resolved_recipe_loads_as_an_equal_one(text: str) -> None:
    recipe = load(text, "dataset.validation=0.02", "evaluation.metrics=[chrf]")
    assert load(yaml.safe_dump(recipe.to_dict())) == recipe
    assert json.loads(json.dumps(recipe.to_dict()))["dataset"]["validation"] == 0.02


def test_train_is_a_text_a_mapping_or_a_list_of_both_and_auto_means_the_format_of_the_section() -> None:
    train = "dataset.train=[a.jsonl, {path: b/*.jsonl, format: instruction, weight: 3}]"
    recipe = load(LEAST, "dataset_path=null", train, "dataset.format=conversation")
    assert recipe.dataset.train == (Source("a.jsonl", "conversation"), Source("b/*.jsonl", "instruction", 3))
    assert load(LEAST, "dataset_path={path: org/rows}").dataset.train == (Source("org/rows"),)


def test_numbers_and_words_are_those_of_yaml_1_2() -> None:
    overrides = ["learning_rate=2e-4", "weight_decay=1.E-2", "adam_epsilon=.1e-7", "eval_strategy=no", "seed=010"]
    args = load(LEAST, *(f"training_args.{override}" for override in overrides)).training_args
    assert args == {
        "learning_rate": 0.0002,
        "weight_decay": 0.01,
        "adam_epsilon": 1e-08,
        "eval_strategy": "no",
        "seed": 10,
    }
    assert load(LEAST, "dataset.system='2e-4'").dataset.system == "2e-4"


def test_null_means_the_default() -> None:
    text = LEAST + "dataset: {max_length: null}\nchat:\ntraining_args: {seed: null}\nevaluation: {generation: null}\n"
    assert load(text) == load(LEAST)


def test_evaluation_generation_keeps_the_defaults_it_does_not_name() -> None:
    assert load(LEAST, "evaluation.generation.num_beams=2").evaluation.generation == {
        "max_new_tokens": 256,
        "num_beams": 2,
    }


def test_an_override_wins_over_the_other_spelling_of_its_key() -> None:
    assert load(LEAST, "dataset.train=b.jsonl").dataset.train == (Source("b.jsonl"),)
    assert load(NESTED_SEED, "dataset.validation=0.1").dataset.validation == 0.1


def test_an_override_reaches_below_absent_and_null_sections_and_the_last_one_wins() -> None:
    recipe = load(LEAST + "lora_config:\n", "lora_config.r=4", "training_args.max_steps=1", "training_args.max_steps=2")
    assert recipe.lora_config == {"r": 4}
    assert recipe.training_args == {"max_steps": 2}


def test_an_override_switches_quantisation_off() -> None:
    assert load(FLAT_SEED, "quantization_config.load_in_4bit=false").quantization_config is None


def test_a_whole_number_is_turned_into_the_float_that_bitsandbytes_insists_on() -> None:
    text = LEAST + "lora_config: {}\nquantization_config: {load_in_8bit: true, llm_int8_threshold: 6}\n"
    threshold = (load(text).quantization_config or {})["llm_int8_threshold"]
    assert (threshold, type(threshold)) == (6.0, float)


@pytest.mark.parametrize("text", [LEAST + "training_args: {%s}\n", NESTED_LEAST + "training: {%s}\n"])
def test_gradient_checkpointing_is_read_as_activation_checkpointing(
    text: str, recwarn: pytest.WarningsRecorder
) -> None:
    recipe = load(text % "gradient_checkpointing: false, gradient_checkpointing_kwargs: {use_reentrant: false}")
    assert recipe.training_args == {
        "activation_checkpointing": False,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
    }
    assert recipe == load(
        text % "activation_checkpointing: false, activation_checkpointing_kwargs: {use_reentrant: false}"
    )
    assert recwarn.list == []


def test_a_problem_with_activation_checkpointing_names_the_key_as_the_file_spells_it() -> None:
    recipe = load(LEAST + "training_args: {gradient_checkpointing: true}\n")
    place = "x.yaml:4: training_args.gradient_checkpointing: bad"
    assert str(recipe.error("training_args.activation_checkpointing", "bad")) == place


def test_both_names_of_activation_checkpointing_are_refused_unless_one_is_an_override() -> None:
    text = LEAST + "training_args:\n  gradient_checkpointing: true\n  activation_checkpointing: true\n"
    assert problems(text) == [
        "x.yaml:5: training_args.gradient_checkpointing: says the same as training_args.activation_checkpointing "
        "(x.yaml:6); keep one"
    ]
    for given, override in (("gradient", "activation"), ("activation", "gradient"), ("gradient", "gradient")):
        recipe = load(
            LEAST + f"training_args: {{{given}_checkpointing: true}}\n",
            f"training_args.{override}_checkpointing=false",
        )
        assert recipe.training_args == {"activation_checkpointing": False}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("dataset: {zzz: 1}", "unknown key dataset.zzz; the keys here are train, validation, test, format, system, "),
        ("training_args: {optim: zzz}", "training_args.optim: found 'zzz'; choose from "),
    ],
)
def test_a_mistake_is_never_answered_with_more_than_eight_names(line: str, problem: str) -> None:
    (answer,) = problems(LEAST + line + "\n")
    assert answer.startswith(f"x.yaml:4: {problem}")
    assert answer.endswith(", ...") and answer.count(",") == 8


def test_two_spellings_of_one_key_are_refused() -> None:
    assert problems(LEAST + "dataset: {train: b}\n") == [
        "x.yaml:2: dataset_path: says the same as dataset.train (x.yaml:4); keep one"
    ]


def test_an_unknown_key_is_answered_with_the_line_and_the_nearest_one() -> None:
    assert problems(LEAST + "dataset:\n  max_lenght: 5\n") == [
        "x.yaml:5: unknown key dataset.max_lenght; did you mean 'max_length'?"
    ]


def test_all_problems_are_told_at_once() -> None:
    text = "model_name_or_path: 7\ndataset:\n  train: []\n  packing: yes\n  max_lost: 2\nchat: [a]\nlearning_rate: 1\n"
    assert problems(text, "training_args.optim=adamw_torhc", "dataset.num_proc=0") == [
        "x.yaml:1: model_name_or_path: found 7; give text",
        "x.yaml:3: dataset.train: is an empty list; give at least one",
        "x.yaml:4: dataset.packing: found 'yes'; choose from auto, true, false",
        "x.yaml:5: dataset.max_lost: found 2; give a number at least 0 and at most 1",
        "override dataset.num_proc=0: found 0; give a number at least 1",
        "x.yaml:6: chat: found a list; give a mapping (key: value)",
        "x.yaml:7: learning_rate: belongs in training_args",
        "override training_args.optim=adamw_torhc: found 'adamw_torhc'; did you mean 'adamw_torch'?",
        "x.yaml: output_dir: is missing; give the folder of the run",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("dataset_path: b", "duplicate key dataset_path, given in line 2 already; keep one"),
        ("dataset: {max_length: true}", "dataset.max_length: found true; give a whole number"),
        ("dataset: {max_length: 8.0}", "dataset.max_length: found 8.0; give a whole number"),
        ("dataset: {max_length: 0}", "dataset.max_length: found 0; give a number at least 1"),
        ("dataset: {max_lost: .nan}", "dataset.max_lost: found .nan; give a finite number"),
        ("dataset: {validation: 1}", "dataset.validation: found 1; give a number above 0 and below 1"),
        ("dataset: {test: [{path: t, weight: 0}]}", "dataset.test[0].weight: found 0; give a number above 0"),
        ("dataset: {test: {weight: 1}}", "dataset.test.path: is missing; give a file, a glob or a hub id"),
        ("dataset: {overlength: cut}", "dataset.overlength: found 'cut'; choose from error, drop, trim"),
        ("dataset: {format: instructoin}", "dataset.format: found 'instructoin'; did you mean 'instruction'?"),
        ("dataset.packing: false", "unknown key dataset.packing; nest it: `packing` below `dataset:`"),
        ("chat: {response_template: ''}", "chat.response_template: found ''; give what starts an answer"),
        ("chat: {response_template: [a]}", "chat.response_template[0]: found 'a'; give a whole number"),
        ("model: m", "model: is a section of the nested layout; write model_name_or_path"),
        ("model_init: {dtype: bf16}", "model_init.dtype: found 'bf16'; did you mean 'bfloat16'?"),
        ("model_init: {low_cpu_mem_usage: true}", "model_init.low_cpu_mem_usage: is always so now; remove it"),
        ("lora_config: {bias: nonne}", "lora_config.bias: found 'nonne'; did you mean 'none'?"),
        ("lora_config: {r: 0}", "lora_config.r: found 0; give a number at least 1"),
        ("training_args: {seed: 1, seed: 2}", "duplicate key training_args.seed, given in line 4 already; keep one"),
        ("training_args: {r: 8}", "training_args.r: belongs in lora_config"),
        ("training_args: {max_length: 8}", "training_args.max_length: set dataset.max_length"),
        ("training_args: {output_dir: o}", "training_args.output_dir: set output_dir at the top of the recipe"),
        ("training_args: {no_cuda: true}", "training_args.no_cuda: is now use_cpu"),
        (
            "training_args: {push_to_hub: true}",
            "training_args.push_to_hub: set export.push_to_hub to user/name, which uploads the model when all is done",
        ),
        (
            "training_args: {warmup_ratio: 0.1}",
            "training_args.warmup_ratio: is now warmup_steps, which takes a share of all steps where it is below 1",
        ),
        (
            "export: {format: gglm}",
            "export.format: found 'gglm'; did you mean 'glm'?",
        ),
        (
            "evaluation: {metrics: [bleu, chrff]}",
            "evaluation.metrics[1]: found 'chrff'; did you mean 'chrf'?",
        ),
        ("evaluation: {metrics: [bleu, bleu]}", "evaluation.metrics: names one twice; keep one"),
        (
            "1: 2",
            "unknown key 1; the keys here are model_name_or_path, hub, adapter_name_or_path, output_dir, "
            "resume_from_checkpoint, model_init, dataset, chat, ...",
        ),
        ("? [a]\n: b", "a key of the recipe is not text; put it in quotes"),
        ("chat: !sh {}", "chat: found the YAML tag !sh; write plain YAML"),
        ("dataset: {system: !sh ls}", "dataset.system: found the YAML tag !sh; write plain YAML"),
        (
            "training_args: {seed: 99999999999999999999}",
            "training_args.seed: found 99999999999999999999; give a finite number",
        ),
    ],
)
def test_a_wrong_line_is_answered_with_what_to_do(line: str, problem: str) -> None:
    assert problems(LEAST + line + "\n") == [f"x.yaml:4: {problem}"]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (
            "quantization_config: {load_in_4bit: true}",
            "4: quantization_config: quantised weights cannot be trained, only LoRA weights beside them; "
            "turn LoRA on, or quantisation off",
        ),
        (
            "lora_config: {}\nquantization_config: {load_in_4bit: true, load_in_8bit: true}",
            "5: quantization_config: asks for 4 bits and for 8 bits; choose one",
        ),
        (
            "lora_config: {}\nquantization_config: {bnb_4bit_quant_type: nf4}",
            "5: quantization_config: quantises nothing; add load_in_4bit: true or load_in_8bit: true",
        ),
        (
            "lora_config:\n  target_modules: [q_proj, lm_head]",
            "5: lora_config.target_modules: a LoRA on lm_head would never be trained: the loss reads its weight "
            "directly; take it out, or train it whole with modules_to_save",
        ),
        (
            "lora_config: {target_modules: q_proj}",
            "4: lora_config.target_modules: found 'q_proj', a pattern that whole module paths must match; "
            "write a list, [q_proj]",
        ),
        (
            "training_args: {eval_strategy: steps}",
            "4: training_args.eval_strategy: 'steps' needs dataset.validation; "
            "give a file, or a share held out of train",
        ),
        (
            "dataset: {validation: 0.1}\ntraining_args: {load_best_model_at_end: true, save_strategy: steps}",
            "5: training_args.load_best_model_at_end: needs eval_strategy (epoch) and save_strategy (steps) "
            "to be equal; change one",
        ),
        (
            "dataset: {streaming: true, packing: false}",
            "4: dataset.streaming: a stream has no known length; set training_args.max_steps",
        ),
        (
            "dataset: {streaming: true, packing: false, test: 0.1}\ntraining_args: {max_steps: 1}",
            "4: dataset.test: a share cannot be held out of a stream; give a file",
        ),
        (
            "dataset: {validation: 0.5, test: 0.5}",
            "4: dataset.test: and dataset.validation are shares that leave nothing to train on; give smaller ones",
        ),
        (
            "export: {push_to_hub: keeper}",
            "4: export.push_to_hub: found 'keeper'; give user/name, of letters, digits, '-', '_' and '.'",
        ),
        (
            "lora_config: {r: 8}\nexport: {merge: false}\nevaluation: {model: final}",
            "6: evaluation.model: final needs export.merge: true, which writes final_model/; set it, or adapter here",
        ),
        (
            "chat: {instruction_template: '<user>'}",
            "4: chat.instruction_template: needs chat.response_template, which starts the answers; give both",
        ),
        (
            "chat:\n  variables: {enable_thinking: false, tools: []}",
            "5: chat.variables.tools: is given to the chat template with each conversation; take it out",
        ),
        (
            "chat:\n  variables: {levels: [{1: low}]}",
            "5: chat.variables.levels: is not JSON: keys must be text, and text whole characters; quote or mend it",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(lines: str, problem: str) -> None:
    assert problems(LEAST + lines + "\n") == [f"x.yaml:{problem}"]


def test_an_adapter_to_go_on_from_makes_up_for_an_absent_lora_config() -> None:
    text = LEAST + "adapter_name_or_path: a\nquantization_config: {load_in_8bit: true}\n"
    assert load(text).lora_config is None


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("dataset.max_lenght=5", ": unknown key dataset.max_lenght; did you mean 'max_length'?"),
        ("dataset.max_length", ": write key.path=value, e.g. training_args.max_steps=10"),
        ("dataset.=5", ": write key.path=value, e.g. training_args.max_steps=10"),
        ("dataset.train={weight: 2}", ": dataset.train.path: is missing; give a file, a glob or a hub id"),
        ("dataset_path.path=b", ": dataset_path is 'a.jsonl'; override dataset_path as a whole"),
        (
            "chat={loss_on: [}",
            ": not YAML: while parsing a flow node, expected the node content, but found '}'; "
            "quote text with special characters",
        ),
    ],
)
def test_a_wrong_override_is_named_as_it_was_given(override: str, problem: str) -> None:
    assert problems(LEAST, override) == [f"override {override}{problem}"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("output_dir: o", "output_dir: a file with a section `model` says model.output_dir instead"),
        (
            "model_name_or_path: o",
            "model_name_or_path: a file with a section `model` says model.base_model_path instead",
        ),
        ("training: {num_epoch: 1}", "unknown key training.num_epoch; did you mean 'num_epochs'?"),
        (
            "training: {num_epochs: 1, num_train_epochs: 1}",
            "training.num_epochs: says the same as training.num_train_epochs (x.yaml:3); keep one",
        ),
        ("lora: {use_lora: 1}", "lora.use_lora: found 1; give true or false"),
    ],
)
def test_a_wrong_nested_file_is_answered_in_its_own_words(line: str, problem: str) -> None:
    assert problems(NESTED_LEAST + line + "\n") == [f"x.yaml:3: {problem}"]


def test_a_quantised_full_fine_tuning_names_the_flag_of_the_nested_file() -> None:
    assert problems(NESTED_SEED, "lora.use_lora=false") == [
        "x.yaml:4: model.use_4bit: quantised weights cannot be trained, only LoRA weights beside them; "
        "turn LoRA on, or quantisation off"
    ]


def test_missing_keys_are_named_as_the_layout_spells_them() -> None:
    assert problems("model_name_or_path: m\noutput_dir: o\ndataset: {packing: false}\n") == [
        "x.yaml:3: dataset.train: is missing; give a file, a glob or a hub id"
    ]
    assert problems("model: {}\n") == [
        "x.yaml:1: model.base_model_path: is missing; give a hub id or a local folder",
        "x.yaml:1: model.output_dir: is missing; give the folder of the run",
    ]
    assert problems("model: {base_model_path: m, output_dir: o}\n") == [
        "x.yaml: dataset.train_path: is missing; give a file, a glob or a hub id"
    ]


def test_a_problem_found_later_names_the_place_as_the_file_spells_it() -> None:
    flat, nested = load(FLAT_SEED, "dataset.format=auto"), load(NESTED_SEED, "dataset.val_path=v.jsonl")
    assert str(flat.error("dataset.train", "no such file")) == "x.yaml:2: dataset_path: no such file"
    assert str(flat.error("dataset.train[0].path", "no such file")) == "x.yaml:2: dataset_path: no such file"
    assert str(flat.error("dataset.format", "bad")) == "override dataset.format=auto: bad"
    assert str(flat.error("training_args.seed", "bad")) == "x.yaml:16: training_args.seed: bad"
    assert str(flat.error("chat.template", "bad")) == "x.yaml: chat.template: bad"
    assert str(nested.error("dataset.train", "no such file")) == "x.yaml:7: dataset.train_path: no such file"
    assert str(nested.error("dataset.validation", "bad")) == "override dataset.val_path=v.jsonl: bad"
    assert str(nested.error("training_args.seed", "bad")) == "x.yaml:11: training.seed: bad"
    assert str(nested.error("lora_config.target_modules", "bad")) == "x.yaml:21: lora.target_modules: bad"


TOKEN = "hf_" + "a" * 34


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (LEAST + f"training_args: {{hub_token: {TOKEN}}}\n", []),
        (LEAST + f"model_init: {{token: {TOKEN}}}\n", []),
        (LEAST + f"training_args: {{deepspeed: {{wandb_api_key: {TOKEN}}}}}\n", []),
        (LEAST + f"dataset: {{system: 'use {TOKEN}'}}\n", []),
        (LEAST, [f"training_args.hub_token={TOKEN}"]),
        (LEAST, [f"training_args.run_name={TOKEN}"]),
    ],
)
def test_a_secret_is_refused_and_never_repeated(text: str, overrides: list[str]) -> None:
    (problem,) = problems(text, *overrides)
    assert problem.endswith("set HF_TOKEN or WANDB_API_KEY, or run `hf auth login`")
    assert TOKEN not in problem


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", ": is empty; a recipe has at least model_name_or_path, output_dir and dataset_path"),
        (b"# a comment\n", ": is empty; a recipe has at least model_name_or_path, output_dir and dataset_path"),
        (b"- a\n", ": found a list; a recipe is lines of `key: value`"),
        (b"a: b: c\n", ":1:5: not YAML: a second `: ` in this line; put text that holds one in quotes"),
        (
            b"dataset_path: *.jsonl\n",
            ":1:16: not YAML: while scanning an alias, expected alphabetic or numeric character, but found '.'; "
            "quote text with special characters",
        ),
        (
            b"a: 1\n---\nb: 2\n",
            ":2:1: not YAML: expected a single document in the stream, but found another document; "
            "quote text with special characters",
        ),
        (b'a: "b\nc: 1\nd: "2"\n', ":1:4: not YAML: this quote is closed in line 3 only; close it where its text ends"),
        (b"a: 'it's'\n", ":1:8: not YAML: found text after a closing quote; write a quote within quotes twice"),
        (
            b"a:\n  b: 1\n   c: 2\n",
            ":3:5: not YAML: this line is indented deeper than line 2, which has its value already; indent both alike",
        ),
        (
            b"a:\n    b: 1\n  c: 2\n",
            ":3:3: not YAML: this line is indented like none above it; indent it like the keys beside it",
        ),
        (b"a\nb: 1\n", ":1:1: not YAML: no `: ` in this line; write key: value"),
        (b"a: {b: 1\nc: 2\n", ":1:4: not YAML: this { is never closed; write }, and a comma between two values"),
        (b"a: \x07\n", ":1: not YAML: the character U+0007 is not allowed; remove it"),
        ("a: 模型\n".encode("utf-16"), ": is UTF-16, or not text at all; save it as UTF-8"),
        ("\na: 模型\n".encode("gbk"), ":2: is not UTF-8 (GBK, or another encoding?); save it as UTF-8"),
        (b"a: " + b"[" * 2000, ":1: is nested too deeply, or an alias holds itself; write the values out"),
        (b"chat: &a [*a]\n", ":1: is nested too deeply, or an alias holds itself; write the values out"),
        (b"#" * 300_000, ": has 300000 bytes; a recipe is a short YAML file"),
    ],
)
def test_a_file_that_is_no_recipe_is_told_apart(content: bytes, problem: str) -> None:
    assert problems(content) == [f"x.yaml{problem}"]


def test_a_utf8_byte_order_mark_is_no_problem() -> None:
    Path("x.yaml").write_bytes(b"\xef\xbb\xbf" + LEAST.encode())
    assert load_recipe("x.yaml").model_name_or_path == "m"


def test_an_alias_bomb_is_refused() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    (problem,) = problems(bomb)
    assert problem.endswith("more than 100000 values; write aliases of aliases out")


def test_a_missing_file_and_a_directory_are_told_apart() -> None:
    load(LEAST)
    Path("maren.yaml").touch()
    Path("maren.txt").touch()
    for name in ("maren.yml", "Maren.yaml", "mraen.yaml"):
        with pytest.raises(RecipeError, match=rf"^{name}: no such file; did you mean 'maren.yaml'\?$"):
            load_recipe(name)
    with pytest.raises(RecipeError, match="^y.yaml: no such file; recipes/ holds ready ones$"):
        load_recipe("y.yaml")
    with pytest.raises(RecipeError, match="^none.yaml: no such file; recipes/ holds ready ones$"):
        load_recipe("none.yaml")
    with pytest.raises(RecipeError, match="^[.]: is not a file; give the recipe's YAML file$"):
        load_recipe(".")


def test_reading_a_recipe_imports_no_torch() -> None:
    Path("x.yaml").write_text(LEAST, encoding="utf-8")
    code = "import sys, sft.recipe as r; r.load_recipe('x.yaml'); print({'torch', 'trl'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("set()\n", "")
