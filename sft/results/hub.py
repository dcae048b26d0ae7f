"""The upload of the trained model to the hub, and what is seen before training of whether it will work.

The token is the library's business alone, from HF_TOKEN or `hf auth login`: no file and no message of ours holds it.
"""

import shlex
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from sft.errors import UserError
from sft.model.source import HUB_TIMEOUT_SECONDS, first_line
from sft.processes import say
from sft.recipe import Recipe

KEY = "export.push_to_hub"


def check_upload(recipe: Recipe, is_made: bool = False) -> None:
    """Sees that the run will be able to upload. Does nothing where the recipe wants no upload.

    Args: is_made: makes the repository, where there is none yet: the only proof that it can be made.
    Raises: RecipeError: nobody is logged in, or somebody who may not write there, or the hub does not answer.
    """
    name = recipe.export.push_to_hub
    if name is None:
        return
    api = HfApi()
    try:
        is_new = False
        try:
            api.model_info(name, timeout=HUB_TIMEOUT_SECONDS)  # the only call that has a time limit, hence the first
        except RepositoryNotFoundError:
            is_new = True
        account = api.whoami()
        user, owner = account["name"], name.split("/")[0]
        mine = [user, *(organisation["name"] for organisation in account.get("orgs") or [])]
        if (account.get("auth") or {}).get("accessToken", {}).get("role") == "read":
            raise recipe.error(KEY, f"the token of {user} may only read; make one that may write, and log in with it")
        if owner not in mine and is_new:
            raise recipe.error(KEY, f"{user} cannot make a repository of {owner}; give {user}/{name.split('/')[1]}")
        if is_new and is_made:
            api.create_repo(name, private=recipe.export.private, exist_ok=True)
        if is_made or not is_new:
            api.auth_check(name, write=True)
    except UserError:
        raise
    except LocalTokenNotFoundError:
        raise recipe.error(KEY, "nobody is logged in; log in with `hf auth login`, or set HF_TOKEN") from None
    except Exception as error:  # a refusal of the hub, no network, a proxy: all one to the user
        raise recipe.error(KEY, f"{api.endpoint} would not take {name}: {_why(error)}") from None


def upload(recipe: Recipe) -> None:
    """Uploads final_model/, or lora_adapter/ where nothing is merged. Does nothing where the recipe wants no upload.

    Raises: UserError: it did not come to an end; what to type to upload later.
    """
    name = recipe.export.push_to_hub
    if name is None:
        return
    api, folder = HfApi(), uploaded_folder(recipe)
    try:
        api.create_repo(name, private=recipe.export.private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Upload {folder.name}")
    except Exception as error:  # as above
        private = " --private" if recipe.export.private else ""
        command = f"hf upload {name} {shlex.quote(str(folder))} .{private}"
        raise UserError(
            f"{folder} was not uploaded to {name}: {_why(error)}; the run is done and kept, upload it with: {command}"
        ) from None
    say(f"uploaded {folder} to {api.endpoint}/{name}")


def uploaded_folder(recipe: Recipe) -> Path:
    is_merged = recipe.export.merge or recipe.trains_all_weights
    return recipe.output_dir / ("final_model" if is_merged else "lora_adapter")


def _why(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError) and error.server_message:
        return f"{error.response.status_code}, {error.server_message}"
    return first_line(error)
