"""Which checkpoint a run goes on from, and whether it is this run's."""

import json
import re
from pathlib import Path
from typing import Any

from transformers import TrainerState

from sft.recipe import Recipe
from sft.training import parallel

# A checkpoint may be resumed under other values of these; anything else would make it another run.
FREE_ON_RESUME = re.compile(
    r"training_args\.(logging_|save_|eval_|report_to|run_name|disable_tqdm|num_train_epochs|max_steps|dataloader_|log_)"
    r"|evaluation|export|resume_from_checkpoint|output_dir|dataset\.(test|num_proc|max_lost|near_duplicates|cache_gb)|model_init"
)


def checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first; one that was being written when the run was killed is left out."""
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdigit() and is_whole(folder):
            found.append((int(step), folder))
    return [folder for _, folder in sorted(found)]


def is_finished(checkpoint: Path, total_steps: int) -> bool:
    """Whether nothing is left to train after this checkpoint; the Trainer would train one step more."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state.global_step >= state.max_steps >= total_steps


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint was written to its end: trainer_state.json is what the Trainer writes last."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def find_checkpoint(recipe: Recipe, description: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from, as resume_from_checkpoint says.

    Args: description: this run's training_config.json, compared with the one that the checkpoint's run left.
    Raises: RecipeError: there is none where one is named; output_dir holds something else; another recipe made it.
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
        whole = checkpoints(output)
        if not whole:
            return None
        chosen = whole[-1]
    else:
        chosen = Path(str(choice))
        if not chosen.is_dir():
            near = ", ".join(str(folder) for folder in checkpoints(output)) or "none"
            raise recipe.error("resume_from_checkpoint", f"there is no checkpoint {chosen}; there is {near}")
        if not is_whole(chosen):
            raise recipe.error("resume_from_checkpoint", f"{chosen} is not a whole checkpoint (no trainer_state.json)")
    _refuse_strange_state(recipe, chosen)
    _refuse_other_run(recipe, description, chosen)
    return chosen


def _refuse_strange_state(recipe: Recipe, chosen: Path) -> None:
    """Raises: RecipeError: trainer_state.json is JSON, but not what the Trainer writes."""
    state = json.loads((chosen / "trainer_state.json").read_text(encoding="utf-8"))
    for name in ("global_step", "max_steps", "train_batch_size"):
        value = state.get(name) if isinstance(state, dict) else None
        if type(value) is not int or value < 0:
            raise recipe.error(
                "resume_from_checkpoint", f"{chosen}/trainer_state.json is none of a run ({name}: {value!r:.40})"
            )


def _refuse_other_run(recipe: Recipe, description: dict[str, Any], chosen: Path) -> None:
    left = chosen.parent / "training_config.json"
    if not left.is_file():
        return
    try:
        before = json.loads(left.read_text(encoding="utf-8"))
        if not (isinstance(before, dict) and isinstance(before.get("recipe"), dict)):
            raise ValueError("it is no description of a run")
    except ValueError:
        raise recipe.error(
            "resume_from_checkpoint", f"{left} cannot be read; it should say what made {chosen}"
        ) from None
    old, new = _flat(before.get("recipe", {})), _flat(description["recipe"])
    keys = {key for key in old.keys() | new.keys() if not FREE_ON_RESUME.match(key)}
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
