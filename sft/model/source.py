"""Where a model or adapter comes from: a local folder, the hub's cache, or the hub."""

import pickle
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id
from safetensors import SafetensorError

from sft.files import damage
from sft.recipe import Recipe

HUB_TIMEOUT_SECONDS = 10
MAX_SAID = 400  # characters of a library's words in an error; some list hundreds of classes


def find_model(name: str, recipe: Recipe, key: str = "model_name_or_path", file: str = "config.json") -> dict[str, Any]:
    """Sees that a model or adapter is there, before anything slow is begun.

    Returns: keyword arguments for from_pretrained: nothing, or local_files_only where the hub is out of reach.
    Raises: RecipeError: no such folder, or no such repository.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / file).is_file():
            return {}
        raise recipe.error(key, f"the folder {name} holds no {file}; it is not {_what(key)}")
    if folder.exists():
        raise recipe.error(key, f"{name} is a file; give the folder that holds {file}")
    looks_local = name.startswith((".", "/", "~", "models/", "output/")) or name.count("/") > 1 or "\\" in name
    fetch = "; fetch it with: python -m sft.fetch" if "smollm2" in name.lower() else ""
    fetch = recipe.is_elsewhere(name) or fetch
    if looks_local:
        raise recipe.error(key, f"there is no folder {name} (working directory: {Path.cwd()}){fetch}")
    revision, cache = recipe.model_init.get("revision"), recipe.model_init.get("cache_dir")
    if _is_hub_id(name) and isinstance(try_to_load_from_cache(name, file, cache, revision), str):
        offline = not _hub_answers(name, revision)
        return {"local_files_only": True} if offline else {}
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except HFValidationError:
        raise recipe.error(key, f"there is no folder {name}, and a hub id is user/name{fetch}") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        gated = "; log in with `hf auth login`, or set HF_TOKEN" if status in (401, 403) else ""
        raise recipe.error(key, f"the model hub answers {status} for {name}{gated}{fetch}") from None
    except Exception as error:  # no network, a proxy, an impossible name: all one to the user
        raise recipe.error(
            key, f"there is no folder {name}, and the model hub cannot be reached ({error}){fetch}"
        ) from None
    return {}


LFS_POINTER = b"version https://git-lfs"  # what a clone without git-lfs has in the place of a file


def refuse_damaged(name: str, recipe: Recipe, key: str = "model_name_or_path") -> None:
    """Raises: RecipeError: a file in the folder of a model or adapter is not as it was written.

    Of one that is not of a run of ours the formats tell a file that was cut off, but not another value of a weight.
    """
    folder = Path(name).expanduser()
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                what = f"{file.name} is a pointer of git-lfs, not the weights; run `git lfs pull` in that folder"
                raise recipe.error(key, f"{name} does not load: {what}")
    if folder.is_dir() and (found := damage(folder)):
        raise recipe.error(key, f"{name} does not load: {found}; fetch it again, or make it anew")


def source_options(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments for the from_pretrained of what lies beside the weights: configuration and tokenizer.

    Raises: RecipeError: as `find_model`.
    """
    reach = find_model(recipe.model_name_or_path, recipe)
    keys = ("revision", "trust_remote_code", "cache_dir")
    return {key: value for key, value in recipe.model_init.items() if key in keys} | reach


def _what(key: str) -> str:
    return "an adapter" if key == "adapter_name_or_path" else "a model"


def _hub_answers(name: str, revision: str | None) -> bool:
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except Exception:  # the cached copy serves then
        return False
    return True


def local_or_hub(name: str) -> str:
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """What a library says of a file that it cannot take, in a line or two."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = " ".join(lines[:2])
    if isinstance(error, KeyError) and " " not in said:
        said = f"{said!r} is missing in it, or unknown"
    elif isinstance(error, RecursionError):
        said = "it is nested too deep"
    elif isinstance(error, pickle.UnpicklingError):
        said = "a pickle is broken or would run code; it was read as weights only, and nothing was run"
    elif isinstance(error, SafetensorError):
        said = f"a .safetensors file is broken, or something else ({said})"
    elif isinstance(error, TypeError | AttributeError | ArithmeticError):
        said = f"it does not hold what it should ({said})"
    said = re.sub(r"\b[A-Z]\w*Error: ", "", said)
    return said if len(said) <= MAX_SAID else said[: MAX_SAID - 3] + "..."
