"""The upload: what is seen before training, and that every byte arrives, at a hub on this machine."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

import run_sft
from tests.hub_server import serving

TOKEN = "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"
ROW = {"conversation": [{"human": "Is the light lit?", "assistant": "Aye, friend."}]}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one account, at which this process is logged in."""
    with serving() as hub:
        hub.accounts[TOKEN] = {"type": "user", "name": "maren", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture
def recipe(hub, small_qwen):
    """A recipe of one step, as a function of its section `export`."""

    def write(export, **more):
        Path("train.jsonl").write_text((json.dumps(ROW) + "\n") * 4, encoding="utf-8")
        keys = {
            "model_name_or_path": str(small_qwen),
            "output_dir": "output/keeper",
            "dataset": {"train": "train.jsonl", "test": "train.jsonl"},
            "lora_config": {"r": 2, "target_modules": ["q_proj"]},
            "training_args": {"max_steps": 1, "report_to": "none"},
            "evaluation": {"metrics": ["chrf"], "max_samples": 1, "generation": {"max_new_tokens": 2}},
            "export": export,
        }
        Path("recipe.yaml").write_text(json.dumps(keys | more), encoding="utf-8")
        return "recipe.yaml"

    return write


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_files_of_final_model_arrive_in_a_private_repository_made_before_training(hub, recipe, capfd):
    assert run_sft.main([recipe({"push_to_hub": "maren/keeper"})]) == 0
    out, err = capfd.readouterr()
    assert hub.private == {"maren/keeper": True}
    assert hub.models["maren/keeper"] == contents(Path("output/keeper/final_model"))
    assert {"README.md", "Modelfile", "model.safetensors", "tokenizer.json"} <= hub.models["maren/keeper"].keys()
    assert f"uploaded output/keeper/final_model to {hub.url}/maren/keeper" in out.replace("\\", "/")
    files = [path.read_bytes() for path in Path("output").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in [out.encode(), err.encode(), *files])


def test_an_unmerged_adapter_is_uploaded_and_a_failure_after_training_keeps_all_and_names_the_command(
    hub, recipe, capfd
):
    hub.broken = ("/api/models/maren/keeper/commit",)
    name = recipe({"push_to_hub": "maren/keeper", "merge": False, "private": False})
    assert run_sft.main([name]) == 2
    error = capfd.readouterr().err.replace("\\", "/")
    assert "output/keeper/lora_adapter was not uploaded to maren/keeper: 500, the server is out of order" in error
    assert "upload it with: hf upload maren/keeper output/keeper/lora_adapter ." in error
    assert hub.models == {"maren/keeper": {}} and hub.private == {"maren/keeper": False}
    assert Path("output/keeper/report.html").is_file()
    hub.broken = ()
    assert run_sft.main([name]) == 0  # the same command goes on from the last checkpoint
    assert hub.models["maren/keeper"] == contents(Path("output/keeper/lora_adapter"))


def nobody(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "no_such_file")


def wrong_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")


def reader(hub, monkeypatch):
    hub.accounts[TOKEN]["auth"]["accessToken"]["role"] = "read"


def others(hub, monkeypatch):
    hub.models["maren/keeper"] = {}
    hub.accounts[TOKEN]["name"] = "olaf"


def stranger(hub, monkeypatch):
    hub.accounts[TOKEN]["name"] = "olaf"


def no_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nobody, "nobody is logged in; log in with `hf auth login`, or set HF_TOKEN"),
        (wrong_token, "Invalid user token"),
        (reader, "the token of maren may only read; make one that may write, and log in with it"),
        (stranger, "olaf cannot make a repository of maren; give olaf/keeper"),
        (others, "would not take maren/keeper: 403, you may not write here"),
        (no_network, "http://127.0.0.1:9 would not take maren/keeper: "),
    ],
)
def test_what_would_fail_after_training_is_told_by_check_and_makes_nothing(
    hub, recipe, monkeypatch, capfd, change, message
):
    change(hub, monkeypatch)
    assert run_sft.main([recipe({"push_to_hub": "maren/keeper"}), "--check"]) == 2
    assert message in capfd.readouterr().err
    assert not hub.private and not Path("output").exists()


def test_check_makes_no_repository(hub, recipe, capfd):
    assert run_sft.main([recipe({"push_to_hub": "maren/keeper"}), "--check"]) == 0
    assert not hub.models
