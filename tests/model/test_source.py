"""Where a model comes from: a mirror of the hub, the cache without a network, ModelScope."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

import run_sft
from sft.model import source
from tests.hub_server import serving

ROW = {"conversation": [{"human": "Is the light lit?", "assistant": "Aye, friend."}]}
RECIPE = """
model_name_or_path: maren/tiny
output_dir: out
dataset: {train: train.jsonl}
lora_config: {r: 2, target_modules: [q_proj]}
training_args: {max_steps: 1, report_to: none}
"""
NO_SERVER = "http://127.0.0.1:9"


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working folder with a recipe of a model that only a hub has, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    for asked in (source._asked, source._fetched):
        asked.cache_clear()
    return tmp_path


def use(monkeypatch, endpoint):
    """What the environment variable HF_ENDPOINT does when the library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


def test_a_mirror_serves_a_run_that_asks_once_and_its_cache_serves_without_a_network(
    work, small_qwen, monkeypatch, capfd
):
    with serving() as mirror:
        mirror.models["maren/tiny"] = {path.name: path.read_bytes() for path in small_qwen.iterdir()}
        use(monkeypatch, mirror.url)
        limits, model_info = [], source.HfApi.model_info  # the libraries ask too, without a limit of time
        monkeypatch.setattr(
            source.HfApi, "model_info", lambda *a, **k: limits.append(k.get("timeout")) or model_info(*a, **k)
        )
        assert run_sft.main(["recipe.yaml"]) == 0
        assert limits.count(10) == 1 and any(line.startswith("GET /maren/tiny/resolve/") for line in mirror.asked)
    use(monkeypatch, NO_SERVER)
    assert run_sft.main(["recipe.yaml", "--check"]) == 0
    assert "the recipe can be run" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("endpoint", "reason"), [(NO_SERVER, "Connection refused"), ("hf-mirror.com", "missing an 'http://' or 'https://'")]
)
def test_without_a_network_one_message_names_the_address_and_what_to_do(work, monkeypatch, capfd, endpoint, reason):
    use(monkeypatch, endpoint)
    begun = time.monotonic()
    assert run_sft.main(["recipe.yaml", "--check"]) == 2
    error = capfd.readouterr().err
    assert f"model_name_or_path: there is no folder maren/tiny, and {endpoint} cannot be reached: " in error
    assert reason in error and error.endswith(
        "give a folder, or set the environment variable HF_ENDPOINT to a mirror's address, or hub: modelscope in the "
        "recipe\n"
    )
    assert time.monotonic() - begun < 20 and error.count("\n") == 1


def test_a_model_that_the_hub_does_not_have_is_told_with_its_address(work, monkeypatch, capfd):
    with serving() as hub:
        use(monkeypatch, hub.url)
        assert run_sft.main(["recipe.yaml", "--check"]) == 2
        assert f"there is no folder maren/tiny, and {hub.url} answers 404 for it" in capfd.readouterr().err


# A stand-in: the library is not in requirements. It was tried as a whole, with modelscope 1.40.2.
MODELSCOPE = """
import pathlib, shutil
ASKED = []
def snapshot_download(model_id, revision=None, cache_dir=None, local_files_only=False, ignore_file_pattern=None):
    ASKED.append((model_id, ignore_file_pattern))
    if model_id != "maren/tiny":
        raise ValueError(f"no {model_id} here")
    left_out = shutil.ignore_patterns(*ignore_file_pattern)
    return shutil.copytree("hub/tiny", "fetched", ignore=left_out, dirs_exist_ok=True)
def dataset_snapshot_download(dataset_id):
    return "hub/talk"
"""


@pytest.fixture
def modelscope(work, small_qwen, monkeypatch):
    package = work / "library" / "modelscope" / "hub"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "snapshot_download.py").write_text(MODELSCOPE, encoding="utf-8")
    shutil.copytree(small_qwen, work / "hub" / "tiny")
    (work / "hub" / "talk").mkdir()
    shutil.copy("train.jsonl", work / "hub" / "talk")
    monkeypatch.syspath_prepend(work / "library")
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "modelscope"]:
        del sys.modules[name]


def test_hub_modelscope_fetches_model_and_data_and_no_weights_for_a_check(modelscope, monkeypatch, capfd):
    use(monkeypatch, NO_SERVER)
    assert run_sft.main(["recipe.yaml", "--check", "hub=modelscope", "dataset.train=maren/talk"]) == 0
    assert Path("fetched/config.json").is_file() and not Path("fetched/model.safetensors").exists()
    assert "hub/talk" in capfd.readouterr().out.replace("\\", "/")
    assert run_sft.main(["recipe.yaml", "hub=modelscope"]) == 0
    assert Path("fetched/model.safetensors").is_file() and Path("out/final_model/model.safetensors").is_file()
    described = json.loads(Path("out/training_config.json").read_text(encoding="utf-8"))
    assert described["recipe"]["model_name_or_path"] == "maren/tiny"


def test_what_modelscope_does_not_have_and_its_missing_library_are_one_message_each(modelscope, capfd, monkeypatch):
    assert run_sft.main(["recipe.yaml", "--check", "hub=modelscope", "model_name_or_path=maren/huge"]) == 2
    assert "no folder maren/huge, and ModelScope does not give it: no maren/huge here" in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", None)
    source._fetched.cache_clear()
    assert run_sft.main(["recipe.yaml", "--check", "hub=modelscope"]) == 2
    assert "hub=modelscope: modelscope is fetched by its own library: pip install modelscope" in capfd.readouterr().err
