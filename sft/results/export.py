"""What a run leaves behind: lora_adapter/, final_model/, training_config.json; each written beside its place first."""

import hashlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from sft import processes
from sft.data.ledger import Ledger
from sft.files import require_space, seal, whole_folder, writing
from sft.model.chatglm3 import ChatGLMForCausalLM, ChatGLMTokenizer, glm_tensors, save_chatglm, save_glm
from sft.model.load import load_model
from sft.model.lora import load_adapter
from sft.model.machine import default_dtype, device_name
from sft.model.source import local_or_hub, source_options
from sft.processes import say
from sft.recipe import Recipe
from sft.results.certificate import Certificate, certify
from sft.results.merge import NotByShard, ShardMerger, merge_in_memory, untie

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "evaluate", "tokenizers")


def describe_run(recipe: Recipe, ledger: Ledger) -> dict[str, Any]:
    """What made this run: the resolved recipe, versions, the data's fingerprint and the commit; no secrets, no host."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "recipe": recipe.to_dict(),
        "data": {file["path"]: file.get("sha256") for file in ledger["files"] if file["split"] != "test"},
        "versions": versions | {"python": platform.python_version()},
        "commit": _commit(),
        "processes": processes.count(),
        "device": device_name(recipe),
    }


def day_of_run(recipe: Recipe) -> str | None:
    """The day that the chat template showed when the run in output_dir began; None if there is none yet."""
    try:
        left = json.loads((recipe.output_dir / "training_config.json").read_text(encoding="utf-8"))
        return left["recipe"]["chat"]["date"]
    except (OSError, ValueError, TypeError, KeyError):
        return None  # a run that goes on says what is wrong with the file


def _commit() -> str | None:
    """The commit of this repository, with "+changes" where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, encoding="utf-8", check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def make_output_dir(recipe: Recipe) -> None:
    """Raises: RecipeError: it cannot be made."""
    try:
        recipe.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise recipe.error("output_dir", f"{recipe.output_dir} cannot be made: {error.strerror}") from None


@contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """The folder to fill, beside its place until it is whole. Raises: UserError: it cannot be written."""
    with writing(folder), whole_folder(folder) as partial:
        yield partial
        seal(partial, "*.safetensors")  # of the others some are there to be edited


def staging(recipe: Recipe) -> Path:
    """Where all processes put the trained weights together; what comes of them is made from there."""
    return recipe.output_dir / ".trained.partial"


def save_adapter(recipe: Recipe) -> Path:
    """lora_adapter/: what `peft.PeftModel.from_pretrained` loads, from the staging folder."""
    adapter = recipe.output_dir / "lora_adapter"
    with output_folder(adapter) as folder:
        for file in staging(recipe).iterdir():
            # A pickle, which training_config.json says all of; a model card of peft's, which knows nothing of the run.
            if file.name not in ("training_args.bin", "README.md"):
                shutil.move(file, folder)
    return adapter


def save_final_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int], trained: PreTrainedModel
) -> Path:
    """final_model/ of a full fine-tuning: safetensors, tokenizer, template, and a generation config that stops where
    training ended a turn."""
    final = recipe.output_dir / "final_model"
    with output_folder(final) as folder:
        require_space(folder, _size(trained))
        _save_pretrained(recipe, trained, tokenizer, stop_ids, folder)
        shutil.copyfile(recipe.output_dir / "training_config.json", folder / "training_config.json")
    return final


def save_merged_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int], prompts: Sequence[list[int]]
) -> Certificate:
    """final_model/ from lora_adapter/ and the unquantised base, with the certificate that it is both together.

    Args: prompts: token ids, on which the two are compared.
    Raises: ModelError: they differ, or cannot be merged; final_model/ is then as it was before.
    """
    with output_folder(recipe.output_dir / "final_model") as folder:
        _merge(recipe, tokenizer, stop_ids, folder)
        shutil.copyfile(recipe.output_dir / "training_config.json", folder / "training_config.json")
        return certify(recipe, folder, prompts)


def _merge(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int], folder: Path) -> None:
    adapter = recipe.output_dir / "lora_adapter"
    try:
        merger = ShardMerger(recipe, adapter)
    except NotByShard as reason:
        say(f"merging in memory, not shard by shard: {reason}")
        base = load_model(recipe, quantised=False)
        require_space(folder, _size(base))
        dtypes = {name: weight.dtype for name, weight in base.state_dict().items()}
        merged = merge_in_memory(load_adapter(base, str(adapter), recipe, key="output_dir"), dtypes)
        _save_pretrained(recipe, merged, tokenizer, stop_ids, folder)
        return
    require_space(folder, merger.size)
    is_glm = merger.model.config.model_type == "chatglm" and recipe.export.format != "chatglm"
    weights = folder / "weights"  # out of the way of save_pretrained, which clears its folder of shards
    weights.mkdir()
    renamed = {"renamed": partial(glm_tensors, cast(ChatGLMForCausalLM, merger.model))} if is_glm else {}
    merger.write(weights, **renamed)
    model = cast(PreTrainedModel, merger.adapted.unload().to("meta", default_dtype(recipe)))
    if merger.is_untied:
        untie(model)
    _save_pretrained(recipe, model, tokenizer, stop_ids, folder, weights=False)
    for file in weights.iterdir():
        shutil.move(file, folder)
    weights.rmdir()


def _size(model: PreTrainedModel) -> int:
    return sum(weight.nbytes for weight in model.parameters())


def _save_pretrained(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Iterable[int],
    folder: Path,
    weights: bool = True,
) -> None:
    """What from_pretrained loads, with or without its weights; of ChatGLM3, in the format that the recipe asks for."""
    _set_stops(model, tokenizer, stop_ids)
    if model.config.model_type != "chatglm":
        model.save_pretrained(folder, state_dict=None if weights else {})
        tokenizer.save_pretrained(folder)
        _copy_processor(recipe, model, folder)
    elif recipe.export.format == "chatglm":
        save_chatglm(cast(ChatGLMForCausalLM, model), local_or_hub(recipe.model_name_or_path, recipe), folder, weights)
    else:
        save_glm(cast(ChatGLMForCausalLM, model), cast(ChatGLMTokenizer, tokenizer), folder, weights)


def _copy_processor(recipe: Recipe, model: PreTrainedModel, folder: Path) -> None:
    """How images become numbers, of a model that also takes these (Gemma 3): servers do not start without."""
    if not hasattr(model.config, "vision_config"):
        return
    for name in ("preprocessor_config.json", "processor_config.json"):
        options: Any = {"_raise_exceptions_for_missing_entries": False, **source_options(recipe)}
        options.pop("trust_remote_code", None)
        if file := cached_file(local_or_hub(recipe.model_name_or_path, recipe, weights=False), name, **options):
            shutil.copyfile(file, folder / name)


def _set_stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int]) -> None:
    """Generation stops at the template's stop tokens beside the model's own; greedy or not stays the model's choice."""
    config = model.generation_config
    eos_ids = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id or []
    config.eos_token_id = sorted({*stop_ids, *eos_ids})
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    config.use_cache = True
    model.config.use_cache = True
    text: Any = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):  # trl's, for training: with a cache they fail
        text.output_router_logits = False


def weights_digest(recipe: Recipe, folder: Path | None = None) -> str:
    """A fingerprint of the trained weights: of an adapter or a model folder, this run's own by default."""
    if folder is None:
        saved = [recipe.output_dir / "lora_adapter", recipe.output_dir / "final_model"]
        folder = next((each for each in saved if each.is_dir()), recipe.output_dir)
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
