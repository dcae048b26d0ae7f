"""Runs of two real processes, as torchrun starts them, on CPUs with gloo: the same run as one, or an error."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import run_sft
from sft import processes
from sft.recipe import load_recipe
from sft.training import arguments, parallel
from tests import forked

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300  # no run of two processes here takes a tenth of it on two idle CPUs; a hang is a failure
RECIPE = """
model_name_or_path: {model}
output_dir: {folder}/out
dataset:
  train: {folder}/train.jsonl
  validation: {root}/data/demo/validation.jsonl
  test: {root}/data/demo/test.jsonl
  max_length: 640
  packing: false
model_init: {{dtype: float32}}
lora_config: {{r: 4, lora_dropout: 0.0, target_modules: [q_proj, v_proj]}}
training_args:
  bf16: false
  num_train_epochs: 2
  per_device_train_batch_size: 1
  per_device_eval_batch_size: 3
  gradient_accumulation_steps: 4
  learning_rate: 1e-2
  logging_steps: 1
  save_steps: 3
  eval_on_start: false  # it would come again on resuming
export: {{merge: false}}
evaluation: {{metrics: [chrf, token_accuracy], max_samples: 5, batch_size: 2, generation: {{max_new_tokens: 4}}}}
"""
TORCHRUN = ("torch.distributed.run", "--nproc_per_node", "2", "--master_port")
HALF = "training_args.gradient_accumulation_steps=2"  # with two processes the rows a step of one with four


@pytest.fixture(scope="module")
def recipe(small_qwen, tmp_path_factory):
    """13 conversations: three steps of four an epoch and one of a single one, which two processes cannot share."""
    folder = tmp_path_factory.mktemp("processes")
    lines = (ROOT / "data/demo/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:13]), encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=small_qwen, folder=folder, root=ROOT), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def one(recipe):
    """The whole run in one process, as the others are to come out."""
    output = recipe.parent / "one"
    assert run_sft.main([str(recipe), f"output_dir={output}"]) == 0
    return output


@pytest.fixture(scope="module")
def two(recipe):
    """Started as a user does."""
    output = recipe.parent / "two"
    run_two(recipe, output, HALF, popen=subprocess.Popen)
    return output


def start_two(recipe, output, *overrides, script=ROOT / "run_sft.py", launcher=TORCHRUN, popen=forked.Popen):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return popen(
        [sys.executable, "-m", *launcher, port, str(script), str(recipe), f"output_dir={output}", *overrides],
        cwd=ROOT,
        env={
            **os.environ,
            "HF_DATASETS_CACHE": str(recipe.parent / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )


def ended(process, already=""):
    """All that the launcher and its two processes said. Fails: they hang."""
    try:
        return already + process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        hanging = [process, *psutil.Process(process.pid).children(recursive=True)]
        for each in hanging:
            each.kill()
        pytest.fail("two processes hang:\n" + process.communicate()[0])


def run_two(recipe, output, *overrides, **started_with):
    process = start_two(recipe, output, *overrides, **started_with)
    said = ended(process)
    assert process.returncode == 0, said
    return said


def history(output):
    log = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    kinds = ("loss", "eval_loss", "learning_rate")
    return {(entry["step"], kind): entry[kind] for entry in log for kind in kinds if kind in entry}


def assert_same_history(output, other, within=1e-5):
    found, expected = history(output), history(other)
    assert found.keys() == expected.keys() and (8, "loss") in found and (8, "eval_loss") in found
    far = {key: (found[key], expected[key]) for key in found if abs(found[key] - expected[key]) > within}
    assert not far


def assert_same_weights(file, other, within=1e-5):
    found, expected = load_file(file), load_file(other)
    assert found.keys() == expected.keys()
    assert max((found[name] - expected[name]).abs().max() for name in found) < within


def copy_of(run, output, checkpoint):
    """A run that was stopped after this checkpoint."""
    output.mkdir()
    shutil.copytree(run / checkpoint, output / checkpoint)
    shutil.copyfile(run / "training_config.json", output / "training_config.json")


# --------------------------------------------------------------------------------------------------- as one process


def test_two_processes_learn_what_one_learns_with_twice_the_accumulation(one, two):
    assert_same_history(two, one)
    assert_same_weights(two / "lora_adapter/adapter_model.safetensors", one / "lora_adapter/adapter_model.safetensors")


def test_two_processes_learn_the_same_of_packed_rows_with_a_last_batch_that_is_not_full(recipe, tmp_path):
    """dataset.packing is auto, and packs as the first process finds, though a probe in the second would say no."""
    packed = ["dataset.packing=auto", "dataset.test=null", "training_args.per_device_train_batch_size=2"]
    script = tmp_path / "disagreeing.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        import run_sft
        from sft import processes
        from sft.training import packing_probe

        if not processes.is_first():
            packing_probe.probe = lambda *asked: packing_probe.Finding(False, "not here")
        sys.exit(run_sft.main())
        """),
        encoding="utf-8",
    )
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_sft.main([str(recipe), f"output_dir={one}", *packed, HALF]) == 0
    run_two(recipe, two, *packed, "training_args.gradient_accumulation_steps=1", script=script)
    assert history(two).keys() == history(one).keys() and len(history(one)) > 6
    assert max(abs(history(two)[key] - value) for key, value in history(one).items()) < 1e-5
    assert_same_weights(two / "lora_adapter/adapter_model.safetensors", one / "lora_adapter/adapter_model.safetensors")


def test_two_processes_answer_each_turn_once_and_as_one(one, two):
    assert (two / "predictions.jsonl").read_bytes() == (one / "predictions.jsonl").read_bytes()
    scores = [json.loads((folder / "scores.json").read_text(encoding="utf-8")) for folder in (two, one)]
    losses = [each.pop("general") for each in scores]
    assert scores[0] == scores[1]
    for name in ("base", "tuned", "difference"):
        assert losses[0].pop(name) == pytest.approx(losses[1].pop(name), abs=2e-4), name
    assert losses[0] == losses[1] and losses[0]["rows"] == 5
    assert not list(two.glob("*partial*"))


def test_what_another_process_had_answered_is_not_answered_again(two, monkeypatch):
    from sft.results import answers

    making = {"made": "by the same"}
    written = answers.Answers(two / "predictions.partial.1.jsonl", making)
    written.add("base", "test.jsonl:3#1", "Aye.", True)
    written.close()
    again = answers.Answers(two / "predictions.partial.jsonl", making, [written.path])
    again.close()
    assert again.entries["base", "test.jsonl:3#1"]["text"] == "Aye."
    for file in two.glob("*partial*"):
        file.unlink()


def test_shares_are_each_nth_and_leave_nothing_out(monkeypatch):
    shares = []
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "3")
        shares.append(processes.share([9, 7, 6, 4]))
    assert shares == [[9, 4], [7], [6]]


def test_lora_looks_for_no_unused_weights(recipe):
    assert arguments.training_config(load_recipe(recipe)).ddp_find_unused_parameters is False
    assert arguments.training_config(load_recipe(recipe, ["lora_config=null"])).ddp_find_unused_parameters is None


# ---------------------------------------------------------------------------------------------------------- resuming


def test_one_process_goes_on_as_two_and_back_as_if_it_had_never_stopped(recipe, one, tmp_path):
    copy_of(one, tmp_path / "two", "checkpoint-3")
    assert "going on from" in run_two(recipe, tmp_path / "two", HALF, "dataset.test=null")
    assert_same_history(tmp_path / "two", one)
    copy_of(tmp_path / "two", tmp_path / "one", "checkpoint-6")
    assert run_sft.main([str(recipe), f"output_dir={tmp_path / 'one'}", "dataset.test=null"]) == 0
    assert_same_history(tmp_path / "one", one)


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        ([HALF], "to keep 4 rows a step, set training_args.gradient_accumulation_steps=4"),
        (["training_args.gradient_accumulation_steps=1"], "set training_args.gradient_accumulation_steps=4"),
        (["training_args.per_device_train_batch_size=3"], "so 4 rows a step cannot be kept"),
        (["training_args.train_sampling_strategy=group_by_length"], "the order of rows by group_by_length depends"),
    ],
)
def test_other_rows_a_step_are_refused_with_what_keeps_them(recipe, two, tmp_path, capfd, overrides, advice):
    copy_of(two, tmp_path / "out", "checkpoint-6")
    assert run_sft.main([str(recipe), f"output_dir={tmp_path / 'out'}", *overrides]) == 2
    said = capfd.readouterr().err
    assert "was made by 2 processes, and this run has 1" in said and advice in said
    assert not (tmp_path / "out/lora_adapter").exists()


def test_a_run_that_wrote_no_number_of_processes_is_known_by_its_checkpoint(recipe, two, tmp_path, capfd):
    copy_of(two, tmp_path / "out", "checkpoint-6")
    config = json.loads((tmp_path / "out/training_config.json").read_text(encoding="utf-8"))
    assert config.pop("processes") == 2
    (tmp_path / "out/training_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert run_sft.main([str(recipe), f"output_dir={tmp_path / 'out'}", HALF]) == 2
    assert "was made by 2 processes" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("left", "said"), [("pytorch_model_fsdp_0", "FSDP, and this run has none"), ("global_step6", "DeepSpeed, and this")]
)
def test_a_checkpoint_in_parts_is_refused_by_a_run_without_them(recipe, one, tmp_path, capfd, left, said):
    copy_of(one, tmp_path / "out", "checkpoint-6")
    (tmp_path / "out/checkpoint-6" / left).mkdir()
    assert run_sft.main([str(recipe), f"output_dir={tmp_path / 'out'}"]) == 2
    assert f"was made with {said}" in capfd.readouterr().err


# --------------------------------------------------------------------------------------- one decides, all stop at once

LATE = """
import os, sys, time
import run_sft
run_sft.import_libraries()
from sft import run

describe_run = run.describe_run

def late(*arguments):
    time.sleep(4 * int(os.environ["RANK"]))  # the first is long past the next step when the second comes to it
    return describe_run(*arguments)

run.describe_run = late
sys.exit(run_sft.main())
"""


def test_an_empty_output_dir_is_empty_to_all_and_a_full_one_is_told_once(recipe, tmp_path):
    script = tmp_path / "late.py"
    script.write_text(LATE, encoding="utf-8")
    overrides = ["resume_from_checkpoint=false", "dataset.test=null", "training_args.max_steps=1"]
    run_two(recipe, tmp_path / "out", *overrides, script=script)
    process = start_two(recipe, tmp_path / "out", *overrides, script=script)
    said = ended(process)
    assert said.count("output_dir must be empty") == 1, said
    assert re.findall(r"exitcode +: (-?\d+)", said) == ["2", "2"], said


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM here")
@pytest.mark.parametrize(
    ("number", "whom"), [(signal.SIGTERM, "second"), (signal.SIGTERM, "launcher"), (signal.SIGINT, "launcher")]
)
def test_a_signal_to_one_process_or_to_the_launcher_saves_once_and_stops_all(recipe, tmp_path, number, whom):
    output = tmp_path / "out"
    process = start_two(recipe, output, "training_args.num_train_epochs=200", "training_args.save_steps=5000")
    seen = ""
    while "  loss " not in seen:
        seen += process.stdout.readline()
        assert process.poll() is None, seen
    workers = psutil.Process(process.pid).children()
    (max(workers, key=lambda worker: worker.pid) if whom == "second" else process).send_signal(number)
    said = ended(process, seen)
    left = [path for path in output.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    assert len(left) == 1, said
    assert said.count(f"stopped by {number.name}: {left[0]} is saved") == 1, said
    assert not any(worker.is_running() for worker in workers) and process.returncode != 0
    if whom == "second":  # of the processes that it ends itself the launcher tells nothing
        assert re.findall(r"exitcode +: (-?\d+)", said) == ["143", "143"], said


def test_an_error_of_one_process_is_raised_in_all_and_told_once(tmp_path):
    script = tmp_path / "errors.py"
    script.write_text(
        textwrap.dedent("""
        import os, time
        from accelerate import PartialState
        from sft import processes
        from sft.errors import DataError
        PartialState(cpu=True)

        def raises_in(rank):
            if processes.rank() == rank:
                raise DataError(f"of {rank}")
            return processes.rank()

        assert processes.gather(processes.rank() * 2) == [0, 2]
        assert processes.highest(processes.rank() + 5) == 6
        assert processes.agree(lambda: raises_in(7)) == processes.rank()
        assert processes.decide(lambda: raises_in(1)) == 0
        for work, rank in ((processes.decide, 0), (processes.agree, 1)):
            try:
                work(lambda: raises_in(rank))
            except DataError as error:
                assert error.agreed and processes.tells(error) == processes.is_first()
                print(f"process {processes.rank()}: {error}", flush=True)
        processes.part()
        """),
        encoding="utf-8",
    )
    said = run_two(tmp_path / "none", tmp_path / "out", script=script)
    assert sorted(re.findall(r"process \d: of \d", said)) == [f"process {i}: of {j}" for i in (0, 1) for j in (0, 1)]


# -------------------------------------------------------------------------------------------------------------- FSDP2

SHARDED = [HALF, "training_args.fsdp=true"]
ON_CPU = ROOT / "tests/sharded_on_cpu.py"


@pytest.fixture(scope="module")
def sharded(recipe):
    output = recipe.parent / "sharded"
    said = run_two(recipe, output, *SHARDED, "export.merge=true", script=ON_CPU, popen=subprocess.Popen)
    return output, said


def test_fsdp_trains_saves_merges_and_scores_as_one_process(one, sharded):
    output, _ = sharded
    assert_same_history(output, one)
    name = "lora_adapter/adapter_model.safetensors"
    assert_same_weights(output / name, one / name)
    assert (output / "predictions.jsonl").read_bytes() == (one / "predictions.jsonl").read_bytes()
    assert (output / "final_model/model.safetensors").is_file()
    assert not list(output.glob(".*")), "something was left half-written"


def test_with_fsdp_one_process_of_a_machine_reads_the_weights(sharded):
    _, said = sharded
    assert "process 0 has read 1 files of weights" in said and "process 1 has read 0 files of weights" in said


def test_fsdp_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(recipe, sharded, tmp_path):
    copy_of(sharded[0], tmp_path / "out", "checkpoint-3")
    run_two(recipe, tmp_path / "out", *SHARDED, "export.merge=true", "dataset.test=null", script=ON_CPU)
    name = "lora_adapter/adapter_model.safetensors"
    assert load_file(tmp_path / "out" / name).keys() == load_file(sharded[0] / name).keys()
    assert_same_weights(tmp_path / "out" / name, sharded[0] / name)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM here")
@pytest.mark.parametrize("method", ["LoRA", "full"])
def test_fsdp_stopped_by_a_signal_to_one_process_goes_on_as_if_undisturbed(recipe, sharded, tmp_path, method):
    undisturbed, name = sharded[0], "lora_adapter/adapter_model.safetensors"
    options = [*SHARDED, "dataset.test=null", "export.merge=true"]
    if method == "full":
        undisturbed, name = tmp_path / "whole", "final_model/model.safetensors"
        options += ["lora_config=null", "training_args.learning_rate=1e-3"]
        run_two(recipe, undisturbed, *options, script=ON_CPU)
    process = start_two(recipe, tmp_path / "out", *options, script=ON_CPU)
    seen = ""
    while "  loss " not in seen:
        seen += process.stdout.readline()
        assert process.poll() is None, seen
    workers = psutil.Process(process.pid).children()
    max(workers, key=lambda worker: worker.pid).send_signal(signal.SIGTERM)
    said = ended(process, seen)
    assert said.count("stopped by SIGTERM") == 1 and "is saved" in said, said
    assert "going on from" in run_two(recipe, tmp_path / "out", *options, script=ON_CPU)
    assert_same_weights(tmp_path / "out" / name, undisturbed / name)


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_fsdp_leaves_a_whole_model_after_full_fine_tuning(recipe, tmp_path, kind):
    full = ["lora_config=null", "training_args.max_steps=2", "training_args.learning_rate=1e-3"]
    assert run_sft.main([str(recipe), f"output_dir={tmp_path / 'one'}", *full]) == 0
    run_two(
        recipe,
        tmp_path / "two",
        *full,
        *SHARDED,
        f"training_args.fsdp_config={{state_dict_type: {kind}}}",
        script=ON_CPU,
    )
    name = "final_model/model.safetensors"
    assert_same_weights(tmp_path / "two" / name, tmp_path / "one" / name)
    assert (tmp_path / "two/scores.json").read_bytes() == (tmp_path / "one/scores.json").read_bytes()


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2_qlora", "zero2", "zero3"])
def test_each_file_of_launch_starts_a_run_that_saves_and_scores(recipe, tmp_path, name):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    overrides = ["training_args.max_steps=1", "training_args.save_steps=1", "export.merge=true", HALF]
    if name == "fsdp2_qlora":
        four_bits = "load_in_4bit: true, bnb_4bit_quant_storage: bfloat16, bnb_4bit_compute_dtype: bfloat16"
        overrides += [f"quantization_config={{{four_bits}}}", "model_init.dtype=bfloat16", "training_args.bf16=true"]
    file = str(ROOT / f"launch/{name}.yaml")
    launcher = ("accelerate.commands.launch", "--config_file", file, "--main_process_port")
    script = ROOT / "run_sft.py" if name == "ddp" else ON_CPU
    popen = subprocess.Popen if name == "ddp" else forked.Popen  # one, as a user starts it
    run_two(recipe, tmp_path / "out", *overrides, script=script, launcher=launcher, popen=popen)
    assert json.loads((tmp_path / "out/training_config.json").read_text(encoding="utf-8"))["processes"] == 2
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"checkpoint-1", "lora_adapter", "final_model", "scores.json"} <= left
    is_sharded = name != "ddp"
    assert bool(list((tmp_path / "out/checkpoint-1").glob("*fsdp*"))) == (is_sharded and name.startswith("fsdp"))


ZERO_3 = """{zero_optimization: {stage: 3, stage3_gather_16bit_weights_on_model_save: %s},
    train_micro_batch_size_per_gpu: auto, gradient_accumulation_steps: auto, train_batch_size: auto,
    gradient_clipping: auto, zero_allow_untested_optimizer: true, zero_force_ds_cpu_optimizer: false}"""


def test_zero_3_trains_saves_merges_scores_and_goes_on_as_one_process(recipe, one, tmp_path):
    pytest.importorskip("deepspeed")
    zero = [HALF, f"training_args.deepspeed={ZERO_3 % 'true'}", "export.merge=true"]
    run_two(recipe, tmp_path / "two", *zero, script=ON_CPU)
    assert_same_history(tmp_path / "two", one, within=1e-4)  # its gradients are summed in another order; seen: 3e-5
    name = "lora_adapter/adapter_model.safetensors"
    assert_same_weights(tmp_path / "two" / name, one / name, within=1e-3)
    assert (tmp_path / "two/predictions.jsonl").read_bytes() == (one / "predictions.jsonl").read_bytes()
    copy_of(tmp_path / "two", tmp_path / "again", "checkpoint-3")
    for said in ("going on from", "training is finished"):
        assert said in run_two(recipe, tmp_path / "again", *zero, "dataset.test=null", script=ON_CPU)
        assert_same_weights(tmp_path / "again" / name, tmp_path / "two" / name, within=1e-4)
        shutil.rmtree(tmp_path / "again/lora_adapter")


def test_zero_3_that_would_save_no_weights_is_refused(recipe, capfd):
    pytest.importorskip("deepspeed")
    assert run_sft.main([str(recipe), f"training_args.deepspeed={ZERO_3 % 'false'}"]) == 2
    assert "ZeRO-3 would save no weights; set zero_optimization.stage3_gather" in capfd.readouterr().err


def test_fsdp_that_would_not_shard_is_refused(recipe, capfd):
    assert run_sft.main([str(recipe), "training_args.fsdp=true"]) == 2
    assert "training_args.fsdp=true: a CPU shards nothing; remove it" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------- other ways to share work


def test_context_parallelism_is_refused_with_packing_only(recipe, monkeypatch, capfd):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    assert run_sft.main([str(recipe), "dataset.packing=true", "--check"]) == 2
    assert "dataset.packing=true: the launcher asks for context parallelism over 2 GPUs" in capfd.readouterr().err
    assert run_sft.main([str(recipe), "--check"]) == 0


@pytest.mark.parametrize(("variable", "name"), [("TP", "tensor"), ("SP", "sequence")])
def test_other_parallelism_of_the_launcher_is_refused(recipe, monkeypatch, capfd, variable, name):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{variable}_SIZE", "2")
    assert run_sft.main([str(recipe), "--check"]) == 2
    assert f"{name} parallelism over 2 GPUs, which is not done here" in capfd.readouterr().err


def test_without_a_launcher_one_gpu_of_many_is_used_and_a_line_says_how_to_use_all(recipe, monkeypatch):
    for module in (arguments, parallel):
        monkeypatch.setattr(module, "use_cpu", lambda recipe: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    made = load_recipe(recipe)
    assert arguments.training_config(made).n_gpu == 1, "trl refuses more once the model has been loaded"
    line = f"4 GPUs are here and one is used; all: torchrun --nproc_per_node 4 run_sft.py {recipe}"
    assert parallel.gpus_line(made) == line
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert parallel.gpus_line(made) is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parallel.gpus_line(made) is None


def test_an_error_of_the_second_process_alone_is_kept_back_and_then_told(monkeypatch):
    from sft.errors import UserError

    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "1")
    assert processes.tells(UserError("out of memory")) and slept == [5]
    monkeypatch.setenv("RANK", "0")
    assert processes.tells(UserError("out of memory")) and slept == [5]
