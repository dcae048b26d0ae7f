"""Each recipe of recipes/ through check, training, stopping, resuming, merging and scoring, with a tiny model.

A new recipe is taken in as it is; models.yaml gets the configuration of its model. What these runs leave out: plain
transformers renders in this process (tests/results/test_parity.py has the fresh one), and no page is drawn.

    python -m tests.recipe.test_shipped_recipes: the memory that the headers of the recipes tell
"""

import json
import re
import signal
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_sft
import sft.run
from sft.errors import RecipeError
from sft.model.load import check_quantisation, load_model, meta_model
from sft.recipe import load_recipe
from sft.results import page, parity, plain_server
from sft.training.memory import estimate_memory
from sft.training.stop import StopAtSignal
from tests.recipe.tiny_models import MODELS, make, published_config, put_in_fp8, recipes

ROOT = Path(__file__).resolve().parents[2]
RECIPES = list(recipes())
RUN_HERE = [path for path in RECIPES if path.stem != "chatglm3_4bit"]  # tests/model/test_chatglm3_run.py runs it
ROWS = [
    {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Maren."}]},
    {
        "messages": [
            {"role": "user", "content": "What is your work?"},
            {"role": "assistant", "reasoning_content": "A few words will do.", "content": "I keep the light."},
            {"role": "user", "content": "Do you sleep?"},
            {"role": "assistant", "content": "By day, a little."},
        ]
    },
]
SIZES = [
    "dataset.max_length=512",
    "training_args.max_steps=2",
    "training_args.save_steps=1",
    "training_args.save_strategy=steps",
    "training_args.gradient_accumulation_steps=1",
    "training_args.per_device_train_batch_size=2",
    "training_args.logging_steps=1",
    "evaluation.generation.max_new_tokens=3",
    "evaluation.metrics=[chrf]",
]


@dataclass
class Run:
    folder: Path
    checked: str
    stopped: str
    said: str
    codes: list[int]

    def json(self, name):
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


class StopInTheFirstStep(StopAtSignal):
    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        signal.raise_signal(signal.SIGINT)


def serve_here(monkeypatch, folder, prompts, day):
    """What parity._serve does, without a process of its own."""
    with TemporaryDirectory() as scratch, monkeypatch.context() as patch:
        patch.setattr(plain_server.chat_template_utils, "datetime", plain_server.chat_template_utils.datetime)
        asked, answer = Path(scratch) / "prompts.jsonl", Path(scratch) / "answer.jsonl"
        lines = [json.dumps({"messages": prompt.messages, "tools": prompt.tools}) for prompt in prompts]
        asked.write_text("\n".join(lines), encoding="utf-8")
        plain_server.main(str(folder), str(asked), str(answer), day)
        return [json.loads(line) for line in answer.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, made_once):
    """run_of(path of a recipe): its run, made when it is first asked for."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")

    def model_of(name):
        if not MODELS[name].get("template"):
            return name
        return made_once(f"tiny {name.replace('/', ' ')}", lambda folder: make(MODELS[name], folder))

    def said_by(*arguments):
        with redirect_stdout(StringIO()) as out:
            code = run_sft.main([*arguments])
        return code, out.getvalue()

    @cache
    def run(path):
        name = load_recipe(path).model_name_or_path
        folder = tmp_path_factory.mktemp(path.stem) / "out"
        splits = [f"dataset.train={data}", f"dataset.test={data}", "dataset.validation=null"]
        given = [f"model_name_or_path={model_of(name)}", f"output_dir={folder}", *splits, *SIZES]
        arguments = [str(path), *given, *MODELS[name].get("overrides", [])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parity, "_serve", lambda *asked: serve_here(patch, *asked))
            patch.setattr(page, "write_report", lambda folder: None)
            checked = said_by(*arguments, "--check")
            with patch.context() as first:
                first.setattr(sft.run, "StopAtSignal", StopInTheFirstStep)
                stopped = said_by(*arguments)
            whole = said_by(*arguments)
        return Run(folder, *(said for _, said in (checked, stopped, whole)), [c for c, _ in (checked, stopped, whole)])

    return run


@pytest.fixture(params=RUN_HERE, ids=lambda path: path.stem)
def run(request, run_of):
    return run_of(request.param)


def test_recipe_is_checked_stopped_and_gone_on_from_where_it_stopped(run):
    assert run.codes == [0, 130, 0]
    assert "the recipe can be run" in run.checked and "trained on in each of" in run.checked
    assert "GB needed" in run.checked and "cannot be told" not in run.checked
    assert f"going on from {run.folder / 'checkpoint-1'}" in run.said
    assert run.json("trainer_state.json")["global_step"] == 2


def test_every_adapter_weight_has_learned(run):
    """One on a module that text does not reach (an image tower, say) would have stayed 0."""
    if (run.folder / "lora_adapter").is_dir():
        weights = load_file(run.folder / "lora_adapter/adapter_model.safetensors")
        assert [name for name, w in weights.items() if "lora_B" in name and not w.any()] == []


def test_final_model_is_base_and_adapter_and_loads_in_plain_transformers(run):
    final = run.folder / "final_model"
    model, loading = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert {key for key, found in loading.items() if found} == set()
    if "merge" in (config := run.json("training_config.json")):
        assert config["merge"]["merge_error"] < config["merge"]["bound"]
    assert getattr(model.config, "quantization_config", None) is None
    assert (final / "preprocessor_config.json").is_file() == hasattr(model.config, "vision_config")
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert config["parity"]["trained_stops"].items() <= config["parity"]["stops"].items()
    asked = [[{"role": "user", "content": text}] for text in ("Hi.", "Are you there? " * 4)]  # past a window of 16
    batch = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    )  # fmt: skip
    assert model.generate(**batch, max_new_tokens=3).shape[1] > batch["input_ids"].shape[1]
    if tokenizer.bos_token:
        assert batch["input_ids"].eq(tokenizer.bos_token_id).sum(1).max() <= 1


def test_answers_are_scored_before_and_after(run):
    scores = run.json("scores.json")
    assert scores["rows"] == 3 and {"base", "tuned"} <= scores.keys()


def test_answers_are_what_carries_loss_each_with_a_stop_token(run):
    stops = run.json("training_config.json")["parity"]["trained_stops"]
    pieces = [piece for sample in run.json("data_ledger.json")["samples"] for piece in sample["pieces"]]
    trained = [text for text, has_loss in pieces if has_loss]
    assert len(trained) >= 2 and all(text.endswith(tuple(stops)) for text in trained)
    for answer in ("I am Maren.", "I keep the light."):
        assert any(answer in text for text in trained)
    assert not any(word in text for text in trained for word in ("Who are you", "your work", "Do you sleep"))


# --------------------------------------------------------------------------------------- what recipes say of themselves


def training_gb(path: Path) -> float:
    """--check's estimate of a step on a GPU, for the published sizes."""
    with TemporaryDirectory() as folder:
        published_config(load_recipe(path).model_name_or_path).save_pretrained(folder)
        given = [f"model_name_or_path={folder}", "training_args.bf16=true"]  # as a GPU would have it
        if load_recipe(path).lora_config:
            given.append("model_init.dtype=bfloat16")
        recipe = load_recipe(path, given)
        return round(sum(estimate_memory(recipe, meta_model(recipe), own_loss=False).values()) / 1e9, 1)


def header_of(path: Path) -> str:
    return re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_names_the_schema_and_the_command(path):
    header = header_of(path)
    schema = re.match(r"# yaml-language-server: \$schema=(.+)\n", header)[1]
    assert (path.parent / schema).resolve() == ROOT / "sft/recipe/schema.json"
    assert f"#   python run_sft.py recipes/{path.name}\n" in header


def test_readme_lists_every_recipe_with_the_memory_of_its_header():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `recipes/(\w+)\.yaml` \|.*?\| (?:about )?([\d.]+ GB)", readme, re.MULTILINE))
    assert listed == {path.stem: re.search(r"# Memory: about ([\d.]+ GB)", header_of(path))[1] for path in RECIPES}


def test_memory_of_a_header_is_that_of_the_estimate():
    path = ROOT / "recipes/qwen2_5_full.yaml"
    assert f"about {training_gb(path)} GB" in header_of(path)


# --------------------------------------------------------------------------------------------- bases of quantised files


def test_base_in_fp8_is_widened_and_not_quantised_again(tmp_path, monkeypatch):
    make(MODELS["Qwen/Qwen3-8B"], tmp_path)
    before = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    put_in_fp8(tmp_path)
    path, base = ROOT / "recipes/qwen3_thinking.yaml", f"model_name_or_path={tmp_path}"
    asked, read = [], AutoModelForCausalLM.from_pretrained

    def spy(*args, quantization_config=None, **options):
        asked.append(quantization_config.dequantize)  # said: without a GPU transformers does so by itself
        return read(*args, quantization_config=quantization_config, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    weight = load_model(load_recipe(path, [base, "model_init.dtype=float32"])).get_parameter(
        "model.layers.0.mlp.up_proj.weight"
    )
    assert asked == [True] and weight.dtype is torch.float32
    assert torch.equal(weight, before.to(torch.float8_e4m3fn).float())
    with pytest.raises(RecipeError, match=r"are quantised already \(fp8\); take this section out"):
        check_quantisation(load_recipe(path, [base, "quantization_config={load_in_8bit: true}"]))


if __name__ == "__main__":
    for each in RECIPES:
        if each.stem != "smollm2_cpu":  # measured
            print(each.stem, training_gb(each), "GB", flush=True)
