"""What the machine does to a run, each with the real fault: a full disk, a signal, a closed pipe, memory that runs out.

One command is run again and again; each time the fault strikes a phase later. Every time it ends in one message and
leaves nothing half-written, and in the end its adapter is that of a run that nothing happened to.

Not here: a lock on NFS without a lock server (no NFS in a container; ENOLCK is refused with its own words), a disk that
fails in the middle (EIO needs a device mapper), a GPU out of memory (benchmarks/gpu.py), SIGKILL (tests/test_run.py).
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from filelock import FileLock

import run_sft
import sft.data.tokens
import sft.results.answers
import sft.results.export
import sft.results.page
import sft.run
from sft import faults
from sft.training import stop
from sft.training.trainer import CompletionTrainer
from tests.results.chatters import random_chatter
from tests.test_run import ROOT, digest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM, tmpfs or rlimit here")

PHASES = {
    "tokenizer": (sft.run, "load_tokenizer"),
    "tokenising": (sft.data.tokens.FileTokeniser, "_to_arrow"),
    "model": (sft.run, "load_model"),
    "step": (CompletionTrainer, "training_step"),
    "validation": (CompletionTrainer, "prediction_step"),
    "weights saved": (CompletionTrainer, "save_model"),
    "checkpoint": (CompletionTrainer, "_save_optimizer_and_scheduler"),
    "state": (CompletionTrainer, "save_state"),
    "weights": (CompletionTrainer, "save_whole"),
    "merged": (sft.results.export, "_save_pretrained"),
    "answers": (sft.results.answers, "generate"),
    "page": (sft.results.page, "write_bytes"),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("job"))


def make_job(folder):
    """In a folder: a tiny model, its data, and the adapter of a run that nothing happens to."""
    chatter = random_chatter("smollm2")
    chatter.model.save_pretrained(folder / "model")
    chatter.encoder.tokenizer.save_pretrained(folder / "model")
    for name, count in (("train", 16), ("validation", 4)):
        rows = (ROOT / f"data/demo/{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:count]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    assert run_sft.main(command(folder, folder / "straight")) == 0
    return folder


def command(job, output, *overrides):
    """Four steps of two batches in two epochs, with dropout, a checkpoint after each epoch."""
    return [
        str(ROOT / "recipes/smollm2_cpu.yaml"),
        f"model_name_or_path={job}/model",
        f"output_dir={output}",
        f"dataset.train={job}/train.jsonl",
        f"dataset.validation={job}/validation.jsonl",
        f"dataset.test={job}/validation.jsonl",
        "dataset.max_length=1024",
        "dataset.packing=false",
        "model_init.dtype=float32",
        "lora_config.lora_dropout=0.1",
        "lora_config.layers_to_transform=null",
        "training_args.bf16=false",
        "training_args.per_device_train_batch_size=4",
        "training_args.gradient_accumulation_steps=2",
        "evaluation.metrics=[chrf]",
        "evaluation.max_samples=2",
        "evaluation.generation.max_new_tokens=2",
        "export.merge=false",
        *overrides,
    ]


@pytest.fixture
def strike(monkeypatch, capfd):
    """Runs a command in which `fault()` happens at the n-th call of a phase. Returns: exit code, what it said."""

    def run(arguments, phase, fault, nth=1):
        owner, name = PHASES[phase]
        real, calls = getattr(owner, name), []

        def struck(*args, **kwargs):
            calls.append(name)
            if len(calls) == nth:
                fault()
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, struck)
            code = run_sft.main(arguments)
        assert len(calls) >= nth, f"the run never came to {phase}"
        said = capfd.readouterr()
        assert "Traceback" not in said.err, said.err
        return code, said.out + said.err

    return run


def hidden(folder):
    return [path.name for path in folder.glob(".*")]


def steps(output):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in output.glob("checkpoint-*"))


def same(job, output):
    return digest(output / "lora_adapter") == digest(job / "straight/lora_adapter")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB, as a folder; fill() leaves `left` bytes free until free() is called."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk needs mount, which only root may use: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk, left=0):
    state = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(state.f_bavail * state.f_frsize - left))


@pytest.fixture
def no_signal_unhandled():
    """A signal that nobody handles must fail a test and not end pytest."""

    def unhandled(number, frame):
        raise AssertionError(f"{signal.Signals(number).name} was not handled")

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, unhandled) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_full_disk_in_each_phase_is_told_in_one_message_and_the_same_command_goes_on(job, small_disk, strike):
    output = small_disk / "out"
    arguments = command(job, output, "export.merge=true")
    full = "No space left on device, 0.000 GB are free; free some space there, and run the same command again"
    for phase, nth, left, unwritten in (
        ("model", 1, 0, None),  # what is written next, much later, is the first checkpoint
        ("checkpoint", 2, 60_000, "checkpoint-4"),  # torch's own error, which names no reason
        ("state", 1, 0, "trainer_state.json"),
        ("weights", 1, 50_000, ""),  # of a Rust library
        ("merged", 1, 0, "final_model"),
        ("answers", 1, 0, "predictions.jsonl"),
        ("page", 1, 0, "loss.png"),
    ):
        kept = steps(output) if output.exists() else []
        code, said = strike(arguments, phase, lambda left=left: fill(small_disk, left), nth)
        assert code == 2, said
        where = output / ("checkpoint-2" if unwritten is None else unwritten)
        assert f"error: {where} cannot be written: {full}" in said, said
        assert not hidden(output), phase
        assert max(kept, default=0) <= max(steps(output), default=0), phase
        (small_disk / "filler").unlink()
    assert run_sft.main(arguments) == 0
    assert same(job, output) and not hidden(output)


def test_sigterm_in_each_phase_stops_the_run_and_the_same_command_goes_on(
    job, tmp_path, strike, monkeypatch, no_signal_unhandled
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    output = tmp_path / "out"
    arguments = command(job, output, "export.merge=true", "training_args.save_total_limit=9")
    for phase, nth, saved in (
        ("tokenizer", 1, []),
        ("tokenising", 1, []),
        ("model", 1, []),
        ("validation", 1, []),  # before the first step: there is nothing to save
        ("step", 1, [1]),
        ("checkpoint", 1, [1, 2]),
        ("step", 1, [1, 2, 3]),
        ("validation", 1, [1, 2, 3, 4]),  # after the last step
        ("state", 1, [1, 2, 3, 4]),
        ("weights", 1, [1, 2, 3, 4]),
        ("merged", 1, [1, 2, 3, 4]),
        ("answers", 1, [1, 2, 3, 4]),
        ("page", 1, [1, 2, 3, 4]),
    ):
        code, said = strike(arguments, phase, lambda: signal.raise_signal(signal.SIGTERM), nth)
        assert code == 143 and said.count("stopped by SIGTERM") == 1, said
        assert (steps(output) if output.exists() else []) == saved, (phase, said)
        assert not output.exists() or not hidden(output), phase
    assert run_sft.main(arguments) == 0
    assert same(job, output)


def test_a_step_that_takes_too_long_after_a_signal_is_given_up_and_done_anew(job, tmp_path, strike, monkeypatch):
    monkeypatch.setattr(stop, "STEP_SECONDS", 0)
    arguments = command(job, tmp_path / "out")
    code, said = strike(arguments, "step", lambda: signal.raise_signal(signal.SIGINT), nth=3)
    assert code == 130 and "checkpoint-1 is saved; the same command goes on from there" in said
    assert steps(tmp_path / "out") == [1]
    assert run_sft.main(arguments) == 0
    assert same(job, tmp_path / "out")


def test_where_a_single_batch_takes_longer_the_run_says_why_no_checkpoint_is_there(job, tmp_path, strike, monkeypatch):
    monkeypatch.setattr(stop, "KILL_SECONDS", 5.1)

    def slow():
        signal.raise_signal(signal.SIGHUP)
        time.sleep(0.5)

    code, said = strike(command(job, tmp_path / "out"), "step", slow)
    assert code == 129 and "a single batch, or the saving, takes longer. If the run is killed now" in said


def test_a_second_ctrl_c_stops_at_once_and_one_that_is_sent_twice_counts_once(job, tmp_path, strike, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    arguments = command(job, tmp_path / "out")
    code, said = strike(arguments, "step", twice)
    assert code == 130 and steps(tmp_path / "out") == [1], said
    monkeypatch.setattr(stop, "ECHO_SECONDS", 0)
    code, said = strike(arguments, "checkpoint", twice)  # in the middle of writing one
    assert code == 130 and "is kept, and the same command goes on from it" in said
    assert steps(tmp_path / "out") == [1]


def test_a_signal_that_was_ignored_when_the_run_began_stays_ignored(no_signal_unhandled):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with pytest.raises(faults.Interrupt) as stopped, faults.on_signals(faults.interrupt):
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
        assert stopped.value.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


ONLY_WEIGHTS, RARE = "training_args.save_only_model=true", "training_args.save_strategy=no"


@pytest.mark.parametrize(
    ("option", "phase", "nth", "patience", "saved"),
    [
        (ONLY_WEIGHTS, "step", 5, 12, {3: True}),
        (ONLY_WEIGHTS, "step", 5, 0, {2: True}),  # an epoch's first, given up
        (ONLY_WEIGHTS, "step", 7, 0, {3: True}),
        (ONLY_WEIGHTS, "validation", 2, 12, {2: True}),
        (ONLY_WEIGHTS, "weights saved", 1, 12, {3: True}),
        (RARE, "step", 5, 0, {2: True}),
        (RARE, "step", 7, 0, {3: True}),
    ],
)
def test_what_is_stopped_keeps_the_optimizer_and_goes_on_as_if_undisturbed(
    job, tmp_path, strike, monkeypatch, option, phase, nth, patience, saved
):
    monkeypatch.setattr(stop, "STEP_SECONDS", patience)
    arguments = command(job, tmp_path / "out", option)
    code, said = strike(arguments, phase, lambda: signal.raise_signal(signal.SIGTERM), nth)
    assert code == 143 and f"checkpoint-{max(saved)} is saved; the same command goes on from there" in said
    folders = {step: tmp_path / f"out/checkpoint-{step}" for step in steps(tmp_path / "out")}
    assert {step: (folder / "optimizer.pt").exists() for step, folder in folders.items()} == saved
    assert run_sft.main(arguments) == 0
    assert same(job, tmp_path / "out") and not (tmp_path / "out/checkpoint-4/optimizer.pt").exists()


def test_a_checkpoint_that_can_be_gone_on_from_is_not_made_again(job, tmp_path, strike, monkeypatch):
    arguments = command(job, tmp_path / "out", ONLY_WEIGHTS)
    assert strike(arguments, "step", lambda: signal.raise_signal(signal.SIGTERM), 5)[0] == 143
    monkeypatch.setattr(stop, "STEP_SECONDS", 0)
    before = (tmp_path / "out/checkpoint-3/optimizer.pt").stat().st_mtime_ns
    assert strike(arguments, "step", lambda: signal.raise_signal(signal.SIGTERM))[0] == 143
    assert (tmp_path / "out/checkpoint-3/optimizer.pt").stat().st_mtime_ns == before


def test_a_signal_that_a_run_about_to_end_ignores_stays_ignored(no_signal_unhandled):
    with faults.on_signals(faults.interrupt):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as processes.part does before the launcher's SIGTERM
    signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_a_run_outlives_the_reader_of_its_output(job, tmp_path):
    """As in `| tee log`, which Ctrl-C ends as well."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", encoding="utf-8") as nobody_reads:
        before = sys.stdout
        sys.stdout = nobody_reads
        try:
            assert run_sft.main(command(job, tmp_path / "out", "--check")) == 0
        finally:
            sys.stdout = before


def test_memory_that_runs_out_is_told_with_the_keys_to_lower(job, tmp_path, strike):
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)

    def limited(allocate):
        def fault():
            with open("/proc/self/statm", encoding="ascii") as stream:
                held = int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (held + 2**26, before[1]))
            allocate()

        return fault

    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux limits a process's memory")
    for phase, allocate, keys in (  # terabytes: gigabytes may lie in what earlier tests freed and the process kept
        ("step", lambda: torch.ones(2**40), "lower training_args.per_device_train_batch_size"),
        ("answers", lambda: bytearray(2**42), "lower evaluation.batch_size"),
    ):
        try:
            code, said = strike(command(job, tmp_path / "out"), phase, limited(allocate))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
        assert code == 2 and "error: the machine's memory ran out: " in said and keys in said, said
    assert run_sft.main(command(job, tmp_path / "out")) == 0
    assert same(job, tmp_path / "out")


def test_weights_that_are_no_numbers_never_replace_a_good_adapter(job, tmp_path, strike):
    """The last step's, which no checkpoint is made of."""
    shutil.copytree(job / "straight/lora_adapter", tmp_path / "out/lora_adapter")
    shutil.copyfile(job / "straight/training_config.json", tmp_path / "out/training_config.json")
    held = []

    def overflow():
        weight = next(w for w in held[0].parameters() if w.requires_grad)
        weight.data.view(-1)[0] = float("nan")

    real = sft.run.add_lora

    def add_lora(*args):
        held.append(real(*args))
        return held[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft.run, "add_lora", add_lora)
        code, said = strike(command(job, tmp_path / "out", "training_args.save_strategy=no"), "state", overflow)
    assert code == 2 and "weights are no numbers any more after step 4; no checkpoint was saved before it" in said
    assert same(job, tmp_path / "out")


@pytest.fixture(scope="module")
def done(job, tmp_path_factory):
    """A finished run of its own, for the verbs."""
    return shutil.copytree(job / "straight", tmp_path_factory.mktemp("done") / "out")


def test_score_and_export_on_a_full_disk_leave_what_was_there(job, done, small_disk, strike):
    output = shutil.copytree(done, small_disk / "out")
    before = (output / "scores.json").read_bytes()
    for verb, phase in (("--score", "answers"), ("--export", "merged")):
        code, said = strike([*command(job, output), verb], phase, lambda: fill(small_disk))
        assert code == 2 and "No space left on device, 0.000 GB are free; free some space there" in said, said
        assert not hidden(output) and (output / "scores.json").read_bytes() == before
        (small_disk / "filler").unlink()
        assert run_sft.main([*command(job, output), verb]) == 0
    assert (output / "scores.json").read_bytes() == before and (output / "final_model").is_dir()


def test_every_verb_refuses_a_folder_that_another_run_writes_to_or_that_is_read_only(job, done, small_disk, capfd):
    shutil.copytree(done, small_disk / "out")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for verb in ([], ["--score"], ["--export"]):
        with FileLock(done / ".lock"):  # as a run holds it
            assert run_sft.main([*command(job, done), *verb]) == 2
        assert f"another run is writing to {done}; wait until it ends" in capfd.readouterr().err
        assert run_sft.main([*command(job, small_disk / "out"), *verb]) == 2
        told = f"{small_disk}/out cannot be written: Read-only file system; make it writable, or name another folder"
        assert told in capfd.readouterr().err


def test_an_output_dir_that_vanishes_is_told_and_the_same_command_begins_anew(job, tmp_path, strike):
    output = tmp_path / "out"
    code, said = strike(command(job, output), "checkpoint", lambda: shutil.rmtree(output))
    assert code == 2 and f"{output}/checkpoint-2 cannot be written: No such file or directory" in said, said
    assert run_sft.main(command(job, output)) == 0
    assert same(job, output)


def test_a_score_into_a_folder_that_cannot_be_made_is_refused_in_one_message(job, capfd):
    assert run_sft.main([*command(job, "/proc/out"), "--score"]) == 2
    assert (
        "error: override output_dir=/proc/out: /proc/out cannot be made: No such file or directory\n"
        in capfd.readouterr().err
    )
