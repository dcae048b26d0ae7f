"""What can be done again with a run's folder: --score and --export."""

import json
from pathlib import Path
from typing import Any

import transformers

from sft.data.splits import prepare
from sft.model.load import load_model
from sft.model.lora import load_adapter
from sft.model.machine import check_machine, local_device
from sft.model.tokenizer import load_tokenizer
from sft.recipe import Recipe
from sft.results import export, page
from sft.results.evaluation import EvaluatedModel, evaluate_models
from sft.results.summary import run_summary
from sft.run import check_parity, say


def score_again(recipe: Recipe) -> int:
    """--score: the run's own adapter or model, or the one that an override names, on dataset.test."""
    if recipe.dataset.test is None:
        raise recipe.error("dataset", "--score needs dataset.test")
    tokenizer = load_tokenizer(recipe)
    check_machine(recipe)
    data = prepare(recipe, tokenizer, scoring_only=True)
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    adapter, final = recipe.output_dir / "lora_adapter", recipe.output_dir / "final_model"
    device = local_device(recipe)
    base: Any = load_model(recipe, training=False)
    if not recipe.quantization_config:
        base.to(device)
    base_name = recipe.model_name_or_path
    chosen = recipe.adapter_name_or_path
    if adapter.is_dir() and chosen in (None, _begun_from(recipe)):
        chosen = str(adapter)  # the run's own, also where it went on from another
    if chosen:
        model = load_adapter(base, chosen, recipe, key="adapter_name_or_path")
        digest = export.weights_digest(recipe, Path(chosen))
        models = [EvaluatedModel("base", model, False, base_name), EvaluatedModel("tuned", model, True, digest)]
    elif final.is_dir() and recipe.trains_all_weights:
        tuned: Any = transformers.AutoModelForCausalLM.from_pretrained(final, dtype=base.dtype)
        tuned.to(device)
        digest = export.weights_digest(recipe, final)
        models = [EvaluatedModel("base", base, True, base_name), EvaluatedModel("tuned", tuned, True, digest)]
    else:
        say(f"{recipe.output_dir} holds no run: scoring {base_name} alone")
        models = [EvaluatedModel("base", base, True, base_name)]
    scores = evaluate_models(recipe, data.encoder, data.test_conversations, models)
    if (recipe.output_dir / "training_config.json").is_file():
        page.write_report(recipe.output_dir)
        say(run_summary(recipe.output_dir))
    else:  # no run, so no page of it
        for model_name, entries in (("base", scores.get("base", {})), ("tuned", scores.get("tuned", {}))):
            for name, entry in entries.items():
                shown = entry.get("reason") or round(entry["score"] or 0.0, 2)
                say(f"{f'{model_name} {name}':<24}{shown}")
    return 0


def _begun_from(recipe: Recipe) -> str | None:
    """The adapter that the run in output_dir went on from."""
    config = recipe.output_dir / "training_config.json"
    if not config.is_file():
        return None
    return json.loads(config.read_text(encoding="utf-8"))["recipe"]["adapter_name_or_path"]


def export_again(recipe: Recipe) -> int:
    """--export: final_model/ from lora_adapter/, once more."""
    adapter = recipe.output_dir / "lora_adapter"
    if not adapter.is_dir():
        raise recipe.error("output_dir", f"there is no {adapter} to merge; train first")
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    say(f"saved {export.save_final_model(recipe, tokenizer, data.encoder.stop_ids)}")
    check_parity(recipe, json.loads((recipe.output_dir / "training_config.json").read_text(encoding="utf-8")), data)
    return 0
