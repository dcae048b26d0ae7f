"""What the machine decides: dtypes by GPU, and what is refused. The GPUs are stand-ins that answer as torch does."""

import types
import warnings

import pytest
import torch

from sft.errors import UserError
from sft.model.machine import autocast_dtype, check_machine, default_dtype, local_device, use_cpu
from sft.recipe import load_recipe

LORA = "lora_config={r: 4, target_modules: [q_proj]}"
FOUR_BITS = "quantization_config={load_in_4bit: true, bnb_4bit_compute_dtype: bfloat16}"


@pytest.fixture
def recipe(tmp_path):
    def make(*overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text("{model_name_or_path: m, output_dir: out, dataset: {train: t.jsonl}}", encoding="utf-8")
        return load_recipe(path, overrides)

    return make


@pytest.fixture
def gpu(monkeypatch):
    def plug_in(name, major):
        """An NVIDIA GPU of a compute capability. torch emulates bfloat16 on those that lack it."""
        monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(major=major))

    return plug_in


@pytest.fixture
def apple(monkeypatch):
    def plug_in(macos):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos >= major)

    return plug_in


# ------------------------------------------------------------------------------------------------------------- dtypes


def test_weights_that_all_train_are_float32_under_bfloat16(recipe, gpu):
    gpu("NVIDIA H100", 9)
    assert (default_dtype(recipe()), autocast_dtype(recipe())) == (torch.float32, torch.bfloat16)
    assert default_dtype(recipe(), training=False) == torch.bfloat16, "scoring trains nothing"
    assert default_dtype(recipe(LORA)) == torch.bfloat16, "frozen under LoRA"


def test_a_named_dtype_decides(recipe, gpu):
    gpu("NVIDIA H100", 9)
    for name in ("bfloat16", "float32"):
        named = recipe(f"model_init.dtype={name}")
        assert default_dtype(named) == default_dtype(named, training=False) == getattr(torch, name)
    assert default_dtype(recipe("model_init.dtype=auto")) == torch.float32


@pytest.mark.parametrize("name", ["Tesla T4", "Tesla V100"])
def test_a_gpu_without_bfloat16_trains_in_float16(recipe, gpu, name):
    gpu(name, 7)
    assert (default_dtype(recipe(LORA)), autocast_dtype(recipe(LORA))) == (torch.float16, torch.float16)
    assert (default_dtype(recipe()), autocast_dtype(recipe())) == (torch.float32, torch.float16)
    assert autocast_dtype(recipe("training_args.fp16=false")) is None
    check_machine(recipe(LORA))


@pytest.mark.parametrize(
    ("key", "setting"),
    [
        ("training_args.bf16", "training_args.bf16=true"),
        ("model_init.dtype", "model_init.dtype=bfloat16"),
        ("quantization_config", FOUR_BITS),
    ],
)
def test_bfloat16_is_refused_on_a_gpu_without_it(recipe, gpu, key, setting):
    gpu("Tesla T4", 7)
    with pytest.raises(
        UserError, match=f"{key}=.*: asks for bfloat16, which Tesla T4 has not; (remove it|set float16)"
    ):
        check_machine(recipe(LORA, setting))
    gpu("NVIDIA A100", 8)
    check_machine(recipe(LORA, setting))


def test_float16_weights_that_all_train_are_refused_where_the_loss_is_scaled(recipe, gpu):
    gpu("Tesla T4", 7)
    with pytest.raises(
        UserError, match="model_init.dtype=float16: float16 weights cannot be trained in float16; remove it"
    ):
        check_machine(recipe("model_init.dtype=float16"))
    check_machine(recipe("model_init.dtype=float16", LORA))
    gpu("NVIDIA A100", 8)
    check_machine(recipe("model_init.dtype=float16"))


# -------------------------------------------------------------------------------------------------------- Apple's GPUs


def test_apples_gpus_have_bfloat16_from_macos_14_on(recipe, apple):
    apple(macos=13)
    assert (default_dtype(recipe(LORA)), autocast_dtype(recipe(LORA))) == (torch.float32, None)
    check_machine(recipe(LORA))
    assert local_device(recipe()) == "mps" and not use_cpu(recipe())
    apple(macos=14)
    assert (default_dtype(recipe(LORA)), autocast_dtype(recipe(LORA))) == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("setting", ["training_args.bf16=true", "model_init.dtype=bfloat16"])
def test_bfloat16_is_refused_before_macos_14(recipe, apple, setting):
    apple(macos=13)
    with pytest.raises(
        UserError, match=f"{setting}: bfloat16 needs macOS 14 on Apple's GPUs; remove it, or update macOS"
    ):
        check_machine(recipe(setting))
    apple(macos=14)
    check_machine(recipe(setting))


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "adamw_8bit", "adamw_bnb_8bit", "lion_32bit", "ademamix"])
def test_paged_and_8_bit_optimizers_are_refused_on_apples_gpus(recipe, apple, optim):
    apple(macos=15)
    with pytest.raises(UserError, match=f"optim={optim}: {optim} does not run on Apple's GPUs; set adamw_torch"):
        check_machine(recipe(f"training_args.optim={optim}"))
    check_machine(recipe("training_args.optim=adamw_torch"))
    check_machine(recipe(f"training_args.optim={optim}", "training_args.use_cpu=true"))


# -------------------------------------------------------------------------------------------------- a driver too old


@pytest.fixture
def old_driver(monkeypatch):
    """torch with CUDA 13.0 on a driver for CUDA 11.4, as it answers there: no GPU and a warning, until it is asked."""
    said = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"

    def count():
        warnings.warn(f"CUDA initialization: {said}", UserWarning, stacklevel=2)
        return 0

    def initialise():
        raise RuntimeError(said)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", count, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_init", initialise, raising=False)
    monkeypatch.setattr(torch.cuda, "_cudart", types.SimpleNamespace())


@pytest.mark.filterwarnings("ignore:CUDA initialization")
def test_a_driver_older_than_torch_is_an_error_and_no_silent_run_on_the_cpu(recipe, old_driver):
    assert not torch.cuda.is_available()
    with pytest.raises(UserError, match="the NVIDIA driver is for CUDA 11.4, and this torch for CUDA 13.0, so the GPU"):
        check_machine(recipe())
    check_machine(recipe("training_args.use_cpu=true"))


def test_a_machine_without_a_driver_trains_on_the_cpu_with_a_torch_for_cuda(recipe, old_driver, monkeypatch):
    def initialise():
        raise RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU")

    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_init", initialise)
    check_machine(recipe())
    assert use_cpu(recipe())
