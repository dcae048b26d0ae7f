"""Fixtures that several test files share, and how many workers `pytest -n auto` starts."""

import gc
import os
from types import SimpleNamespace

import psutil
import pytest
from filelock import FileLock

WORKER_BYTES = 4e9  # one that starts two processes of the trainer


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One for each CPU, up to four; xdist itself counts cores, of which a machine with two CPUs may have one."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(4, cpus, int(psutil.virtual_memory().total / WORKER_BYTES)))


# Files of tests that take minutes, the longest first: begun last, they would keep one worker at work and no other.
LONGEST = (
    "test_run",
    "training/test_processes",
    "test_gpu_check",
    "data/test_mask_families",
    "recipe/test_shipped_recipes",
    "test_machine_faults",
    "training/test_memory",
    "test_kills",
)


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist's own order has the files of few tests, and so the longest, last


def pytest_collection_modifyitems(items):
    def place(item):
        return next((at for at, name in enumerate(LONGEST) if f"tests/{name}.py" in item.nodeid), len(LONGEST))

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What the imports make stays to the end; looking for garbage in it takes a fifth of their time, and more later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """made_once(name, make): a folder that make(folder) fills in the first worker that asks for it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name, make):
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def qwen_folder(made_once):
    """A folder with the real Qwen2.5 tokenizer, which takes about three seconds to build."""
    from tests.families import template
    from tests.qwen_tokenizer import build_tokenizer

    return made_once("qwen_tokenizer", lambda folder: build_tokenizer(template("qwen2_5")).save_pretrained(folder))


@pytest.fixture(scope="session")
def qwen_tokenizer(qwen_folder):
    """The real Qwen2.5 tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(qwen_folder)


@pytest.fixture(scope="session")
def tiny_qwen(qwen_folder, made_once):
    """A folder with a random two-layer Qwen2 and the real Qwen2.5 tokenizer: real enough for plumbing."""
    return made_once("tiny_qwen", lambda folder: make_qwen(folder, qwen_folder, vocab_size=151936))


@pytest.fixture(scope="session")
def small_qwen(made_once):
    """As tiny_qwen, with 2,048 token ids and a trained tokenizer of ChatML: a run that starts a second sooner."""
    from tests.families import FAMILIES, build

    def make(folder):
        build(FAMILIES["qwen2_5"], "bytes").save_pretrained(folder)
        make_qwen(folder, folder, vocab_size=2048)

    return made_once("small_qwen", make)


def make_qwen(folder, tokenizer_folder, vocab_size):
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session", autouse=True)
def plain_servers_are_forked():
    """Each run with a merged model asks a process with plain transformers what a server would make of it."""
    from sft.results import parity
    from tests.forked import plain_run

    parity.subprocess = SimpleNamespace(run=plain_run)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Token rows of the tests go to a folder of their own, not to the user's cache."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
