"""Which checkpoint a run goes on from, and whether it is this run's."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerState

from sft.files import CHECKSUMS, damage, is_open, open_seal, seal
from sft.processes import say
from sft.recipe import Recipe
from sft.training import parallel

# A checkpoint may be resumed under other values of these; anything else would make it another run.
FREE_ON_RESUME = re.compile(
    r"training_args\.(logging_|save_|eval_|load_best_model_at_end|report_to|run_name|disable_tqdm|num_train_epochs|max_steps|dataloader_|log_)"
    r"|evaluation|early_stopping|export|hub|resume_from_checkpoint|output_dir|dataset\.(test|num_proc|max_lost|near_duplicates|cache_gb)"
    r"|model_init\.(attn_implementation|experts_implementation|use_kernels|device_map|max_memory|offload_|disable_mmap"
    r"|cache_dir|local_files_only|force_download|use_safetensors)"
)


# What a run writes at its end, over what is there by that name.
RESULTS = ("lora_adapter", "final_model", "trainer_state.json", "scores.json", "predictions.jsonl", "report.html")


def checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first; one that was being written when the run was killed is left out."""
    return [folder for folder in _by_step(output_dir) if is_whole(folder)]


def _by_step(output_dir: Path) -> list[Path]:
    """By the number in their names: a clock may have been set back."""
    found = [folder for folder in output_dir.glob("checkpoint-*") if _step(folder) is not None]
    return sorted(found, key=lambda folder: _step(folder) or 0)


def _step(folder: Path) -> int | None:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else None


def is_whole(folder: Path) -> bool:
    """Whether it was written to its end; of one without a seal, trainer_state.json is what the Trainer writes last."""
    if (folder / CHECKSUMS).is_file():
        return not is_open(folder)
    return _state(folder) is not None


def can_be_gone_on_from(folder: Path) -> bool:
    """Whether it is whole and has more than the weights, which are all that save_only_model keeps."""
    return is_whole(folder) and any(folder.glob("rng_state*.pth"))


def _state(folder: Path) -> Any:
    """A folder's trainer_state.json; None: there is none that can be read."""
    try:
        return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def has_log(output_dir: Path, step: int) -> bool:
    """Whether the log of a run that ended at this step was written, with what comes after the last checkpoint."""
    return (_state(output_dir) or {}).get("global_step") == step


def begin_checkpoint(folder: Path) -> None:
    """An empty folder, not whole until `end_checkpoint`; what a killed run left in its place is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    open_seal(folder)


def end_checkpoint(folder: Path, limit: int | None, best: str | None) -> None:
    """Seals it, and deletes others beyond `limit`, but not the best: first those that were damaged or passed over,
    whose step is beyond this one's, then the oldest. (transformers goes by the clock, and may delete the newest.)
    """
    seal(folder)
    kept = {folder}
    if best and Path(best).resolve().parent == folder.resolve().parent:
        kept.add(folder.parent / Path(best).name)
    step = _step(folder) or 0
    others = [other for other in _by_step(folder.parent) if other not in kept]
    others.sort(key=lambda other: (_step(other) or 0) <= step)
    excess = len(others) + len(kept) - max(limit, len(kept)) if limit and limit > 0 else 0
    for other in others[:excess]:
        open_seal(other)
    remove_unfinished(folder.parent)


def remove_unfinished(output_dir: Path) -> None:
    """Deletes checkpoints that a kill left half-written or half-deleted."""
    for folder in _by_step(output_dir):
        if is_open(folder):
            shutil.rmtree(folder, ignore_errors=True)


def is_finished(recipe: Recipe, checkpoint: Path, total_steps: int) -> bool:
    """Whether nothing is left to train after this checkpoint; the Trainer would train one step more."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    patience = None if recipe.early_stopping is None else recipe.early_stopping.get("early_stopping_patience", 1)
    has_stopped_early = patience is not None and validations_without_gain(state) >= patience
    return has_stopped_early or state.global_step >= state.max_steps >= total_steps


def validations_without_gain(state: TrainerState) -> int:
    """How many there were in a row, by EarlyStoppingCallback's count in a checkpoint."""
    kept: Any = state.stateful_callbacks or {}
    return int(kept.get("EarlyStoppingCallback", {}).get("attributes", {}).get("early_stopping_patience_counter", 0))


def find_checkpoint(recipe: Recipe, description: dict[str, Any], total_steps: int) -> Path | None:
    """The checkpoint to go on from, as resume_from_checkpoint says.

    Args: description: this run's training_config.json, compared with the one that the checkpoint's run left.
    Raises: RecipeError: there is none where one is named; output_dir holds something else; another recipe made it; it
        has the weights alone, and steps are left.
    """
    choice, output = recipe.resume_from_checkpoint, recipe.output_dir
    if choice is False:
        if output.exists() and any(output.iterdir()):
            raise recipe.error(
                "resume_from_checkpoint",
                f"is false, so output_dir must be empty, and {output} is not; empty it, or name another",
            )
        return None
    if choice is True:
        newest = _newest_undamaged(recipe, total_steps)
        if newest is None:
            _refuse_foreign_results(recipe, description)
            return None
        chosen = newest
    else:
        chosen = Path(str(choice))
        if not chosen.is_dir():
            near = ", ".join(str(folder) for folder in checkpoints(output)) or "none"
            raise recipe.error("resume_from_checkpoint", f"there is no checkpoint {chosen}; there is {near}")
        if not is_whole(chosen):
            raise recipe.error("resume_from_checkpoint", f"{chosen} is not a whole checkpoint (no trainer_state.json)")
        if found := damage(chosen) or _lacks(recipe, chosen, total_steps):
            raise recipe.error("resume_from_checkpoint", f"{chosen} cannot be gone on from: {found}; name another")
    _refuse_strange_state(recipe, chosen)
    _refuse_other_run(recipe, description, chosen)
    return chosen


def _lacks(recipe: Recipe, chosen: Path, total_steps: int) -> str | None:
    """What a whole checkpoint lacks to go on from; nothing where nothing is left to train."""
    if can_be_gone_on_from(chosen):
        return None
    _refuse_strange_state(recipe, chosen)
    if is_finished(recipe, chosen, total_steps):
        return None
    return "training_args.save_only_model left out the optimizer, without which it would be another run"


def _refuse_strange_state(recipe: Recipe, chosen: Path) -> None:
    """Raises: RecipeError: trainer_state.json is JSON, but not what the Trainer writes."""
    state = json.loads((chosen / "trainer_state.json").read_text(encoding="utf-8"))
    for name in ("global_step", "max_steps", "train_batch_size"):
        value = state.get(name) if isinstance(state, dict) else None
        if type(value) is not int or value < 0:
            raise recipe.error(
                "resume_from_checkpoint", f"{chosen}/trainer_state.json is none of a run ({name}: {value!r:.40})"
            )


def _newest_undamaged(recipe: Recipe, total_steps: int) -> Path | None:
    """Raises: RecipeError: there are checkpoints, and none will do: training anew is for the user to choose."""
    left_out: list[str] = []
    lacks = None
    for folder in reversed(checkpoints(recipe.output_dir)):
        found = damage(folder) or (lacks := _lacks(recipe, folder, total_steps))
        if found is None:
            if left_out:
                say(f"left out: {'; '.join(left_out)}")
            return folder
        left_out.append(f"{folder}, where {found}")
    if left_out:
        kind = "model" if recipe.trains_all_weights else "adapter"
        raise recipe.error(
            "resume_from_checkpoint",
            f"no checkpoint can be gone on from: {'; '.join(left_out[:3])}; "
            + (
                f"in another output_dir train on from its weights ({kind}_name_or_path)"
                if lacks
                else "restore the file"
            )
            + f", or remove {recipe.output_dir}/checkpoint-* to train from the start",
        )
    return None


def _refuse_foreign_results(recipe: Recipe, description: dict[str, Any]) -> None:
    """Raises: RecipeError: output_dir holds results that no run, or another, has written, and has no checkpoint."""
    output = recipe.output_dir
    held = [name for name in RESULTS if (output / name).exists()]
    if not held:
        return
    if not (output / "training_config.json").is_file():
        raise recipe.error(
            "output_dir",
            f"{output} holds {', '.join(held)}, and no training_config.json of a run that wrote them; name another "
            "folder, or move them, since they would be written over",
        )
    _refuse_other_run(recipe, description, output / held[0])


def _refuse_other_run(recipe: Recipe, description: dict[str, Any], chosen: Path) -> None:
    """chosen: a checkpoint, or what else lies beside the training_config.json of its run."""
    left = chosen.parent / "training_config.json"
    if not left.is_file():
        return
    try:
        before = json.loads(left.read_text(encoding="utf-8"))
        if not (isinstance(before, dict) and isinstance(before.get("recipe"), dict)):
            raise ValueError("it is no description of a run")
    except ValueError:
        raise recipe.error(
            "resume_from_checkpoint",
            f"{left} is not JSON that a run wrote, so whether {chosen} is of this recipe is unknown; restore it, or "
            "remove it if it is",
        ) from None
    old, new = _flat(before.get("recipe", {})), _flat(description["recipe"])
    for side in (old, new):
        if side.get("model_init.revision") == "main":  # the default
            del side["model_init.revision"]
    keys = {key for key in old.keys() | new.keys() if not FREE_ON_RESUME.match(key)}
    if any(isinstance(side.get("dataset.test"), float) for side in (old, new)):
        keys.add("dataset.test")  # a share is taken out of the training rows
    had = before.get("processes") or len(list(chosen.glob("rng_state_*.pth"))) or 1
    parallel.refuse_other_sharding(recipe, chosen)
    if had != description["processes"]:
        parallel.refuse_other_steps(recipe, chosen, (old, had), (new, description["processes"]))
    if parallel.rows_a_step(old, had) == parallel.rows_a_step(new, description["processes"]):
        keys -= parallel.ROWS_OF_PROCESS.keys()  # how a step's rows are shared out changes neither them nor their order
    changed = sorted(key for key in keys if old.get(key) != new.get(key))
    differences = [f"{key}: {old.get(key)!r} then, {new.get(key)!r} now" for key in changed]
    if not changed and before.get("data") != description["data"]:
        differences = ["the training data has another content"]
    if differences:
        raise recipe.error(
            "resume_from_checkpoint",
            f"{chosen} comes from another run ({'; '.join(differences[:5])}); choose another output_dir, or restore "
            "these",
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: value}
