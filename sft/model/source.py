"""Where a model or adapter comes from: a local folder, the hub's cache, or the hub."""

import pickle
import re
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id
from safetensors import SafetensorError

from sft.files import damage
from sft.recipe import Recipe

HUB_TIMEOUT_SECONDS = 10
OTHER_FORMATS, PICKLES = ("*.gguf", "*.onnx"), ("*.bin", "*.pt", "*.pth")  # what is not fetched of ModelScope's files
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
    hint = recipe.where_it_is(name, "fetch it with: python -m sft.fetch" if "smollm2" in name.lower() else "")
    if looks_local:
        raise recipe.error(key, f"there is no folder {name} (working directory: {Path.cwd()}){hint}")
    if recipe.hub == "modelscope":
        if not (Path(_from_modelscope(name, recipe, key, weights=False)) / file).is_file():
            raise recipe.error(key, f"{name} of ModelScope holds no {file}; it is not {_what(key)}")
        return {}
    revision, cache_dir = recipe.model_init.get("revision"), recipe.model_init.get("cache_dir")
    error = _asked(name, revision, HfApi().endpoint)
    if error is None:
        return {}
    if _is_hub_id(name) and isinstance(try_to_load_from_cache(name, file, cache_dir, revision), str):
        return {"local_files_only": True}
    raise recipe.error(key, f"there is no folder {name}, and {_refusal(name, error)}{hint}")


@cache
def _asked(name: str, revision: str | None, endpoint: str) -> Exception | None:
    """What the hub at this address has against a model; asked once in a run."""
    try:
        HfApi(endpoint).model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # whatever the hub client raises, it is about this name or the network
        return error
    return None


def _refusal(name: str, error: Exception) -> str:
    if isinstance(error, HFValidationError):
        return "a hub id is user/name"
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", "an error")
        gated = "; log in with `hf auth login`, or set HF_TOKEN" if status in (401, 403) else ""
        return f"{HfApi().endpoint} answers {status} for it{gated}"
    return (
        f"{HfApi().endpoint} cannot be reached: {first_line(error).rstrip('.')}; give a folder, or set the environment "
        "variable HF_ENDPOINT to a mirror's address, or hub: modelscope in the recipe"
    )


def _from_modelscope(name: str, recipe: Recipe, key: str, weights: bool) -> str:
    """The folder of a model or adapter that ModelScope's library has fetched. Raises: RecipeError: it cannot."""
    pickles = recipe.model_init.get("use_safetensors") is False
    left_out = OTHER_FORMATS + (() if weights and pickles else PICKLES) + (() if weights else ("*.safetensors",))
    try:
        return _fetched(name, recipe.model_init.get("revision"), recipe.model_init.get("cache_dir"), left_out)
    except ImportError:
        raise recipe.error("hub", "modelscope is fetched by its own library: pip install modelscope") from None
    except Exception as error:  # whatever it raises, it is about this name or the network
        what = f"there is no folder {name}, and ModelScope does not give it: {first_line(error)}"
        raise recipe.error(key, what) from None


@cache
def _fetched(name: str, revision: str | None, cache_dir: str | None, left_out: tuple[str, ...]) -> str:
    from modelscope.hub.snapshot_download import snapshot_download

    options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "ignore_file_pattern": list(left_out)}
    try:
        return str(snapshot_download(name, **options))
    except Exception as error:
        try:
            return str(snapshot_download(name, local_files_only=True, **options))  # fetched earlier, no network now
        except Exception:
            raise error from None


LFS_POINTER = b"version https://git-lfs"  # what a clone without git-lfs has in the place of a file


def refuse_damaged(name: str, recipe: Recipe, key: str = "model_name_or_path") -> None:
    """Raises: RecipeError: a file in the folder of a model or adapter is not as it was written.

    Of one that is not of a run of ours the formats tell a file that was cut off, but not another value of a weight.
    """
    folder = Path(local_or_hub(name, recipe, key))
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


def local_or_hub(name: str, recipe: Recipe, key: str = "model_name_or_path", weights: bool = True) -> str:
    """What from_pretrained takes: a folder, that of what ModelScope gives included, or the id of the Hugging Face hub.

    Args: weights: whether ModelScope need give these too.
    Raises: RecipeError: ModelScope does not give it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    return name if recipe.hub == "huggingface" else _from_modelscope(name, recipe, key, weights)


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
