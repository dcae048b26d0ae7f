"""Kills runs with SIGKILL, starts them again with the same command, and compares every file they leave.

    python benchmarks/faults.py [--kills 40] [--seed 0] [--case CASE] [--folder FOLDER]

Each case is first run without a kill. Then runs of it are killed: at moments drawn from their wall time, in the middle
of a step's micro-batches, and while a file of output_dir is being written, or a checkpoint deleted. For that this
process looks at the folder and kills at once. For files that are written too fast to be seen it puts a FIFO where the
run writes first: the run waits there until it is killed, and then half of the file lies there. No code of the run takes
part. After the death the folder says what was hit; a run that was past what was asked for is begun anew, at most TRIES
times, and reported as what it hit. The run is then started again until it ends (some are killed twice), and all that is
in output_dir must be what the undisturbed run left, byte for byte and no file more or less, except, by their nature:

- training_config.json: without its "resources" (seconds and peak memory of the process);
- trainer_state.json: without durations and rows a second, nor the last entry of a training (its duration and its mean
  loss, which transformers counts from where the process began);
- checksums.json of a checkpoint: without that of its trainer_state.json;
- report.html: without the section "Time and memory".

Every killed and every resumed run is a process of its own, forked from one that has imported the libraries and done
nothing else, since the imports would take most of its time. The undisturbed run is started as a user does, with another
hash seed. Linux only. Ten kills are of one case; with --kills 4, as in the tests, it is the first case alone.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
EPOCHS = 3
FORKED = 0.6  # of an undisturbed run's time is what a forked run takes at most: it imports less on its way
TRIES = 8
BEFORE = "out/predictions.partial.jsonl"  # is there before the small files of the end are written
PRELOADED = ["sft.run", "trl.trainer.sft_trainer", "transformers.models.qwen2.modeling_qwen2", "matplotlib.pyplot"]
PATIENCE = 300  # seconds that a run may take
TIMES = re.compile(r"_(runtime|per_second|preparation_time)$")
RECIPE = """
model_name_or_path: {folder}/model
output_dir: out
dataset:
  train: {folder}/train.jsonl
  validation: {folder}/test.jsonl
  test: {folder}/test.jsonl
  max_length: 128
  packing: false
model_init: {{dtype: float32}}
lora_config: {{r: 32, lora_dropout: 0.1, target_modules: [q_proj, k_proj, v_proj, o_proj, up_proj, down_proj]}}
training_args:
  num_train_epochs: {epochs}
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 4
  activation_checkpointing: false
  learning_rate: 1.0e-2
  logging_steps: 3
  save_steps: 2
  save_total_limit: 2
evaluation: {{metrics: [chrf], batch_size: 1, generation: {{max_new_tokens: 8}}}}
"""
PACKED = ["dataset.packing=true", "dataset.max_length=256", "training_args.gradient_accumulation_steps=2"]
# What is told apart: the kind of training, packed or not, what a checkpoint is saved by, which one is exported.
CASES = {
    "LoRA": ["export.merge=false"],
    "LoRA, packed, the best": [
        *PACKED,
        "training_args.save_strategy=epoch",
        "training_args.load_best_model_at_end=true",
        "training_args.metric_for_best_model=eval_loss",
        "training_args.greater_is_better=true",  # so that the best is not the last
    ],
    "4 bits, packed": [
        *PACKED,
        "export.merge=false",
        "quantization_config={load_in_4bit: true, bnb_4bit_quant_type: nf4}",
    ],
    "full": ["lora_config=null", "training_args.learning_rate=1e-3", "training_args.save_total_limit=1"],
}


# ------------------------------------------------------------------------------------------------------------ the runs


def make_inputs(folder: Path) -> None:
    """A random model of two layers with a vocabulary of 700, 16 rows to train on and 4 to score."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.families import FAMILIES, build

    tokenizer = build(FAMILIES["qwen2_5"], "bytes")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, count in (("train", 16), ("test", 4)):
        rows = [{"instruction": f"Say {name} {i}.", "output": f"Here is {name} {i * i}, aye."} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, epochs=EPOCHS), encoding="utf-8")


def run_here(arguments: list[str], folder: Path, log: Path) -> None:
    """The whole run, in a process of its own: output_dir and the cache lie in `folder`."""
    import datasets

    import run_sft

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    os.chdir(folder)
    sys.exit(run_sft.main(arguments))


class Runs:
    """Starts runs of a case, each in a folder of its own."""

    def __init__(self, folder: Path, arguments: list[str]):
        self.folder, self.arguments = folder, arguments
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def start(self, folder: Path) -> Any:
        process = self.context.Process(target=run_here, args=(self.arguments, folder, folder / "log"))
        process.start()
        return process

    def finish(self, folder: Path) -> str:
        """Runs to the end. Returns: what it said. Raises: RuntimeError: it failed."""
        log = folder / "log"
        before = log.stat().st_size if log.exists() else 0
        process = self.start(folder)
        process.join(PATIENCE)
        said = log.read_text(encoding="utf-8", errors="replace")[before:]
        if process.exitcode != 0:
            process.kill()
            raise RuntimeError(f"exit code {process.exitcode} in {folder}:\n{said[-3000:]}")
        return said

    def undisturbed(self, folder: Path) -> float:
        """As a user starts it. Returns: the seconds from its first line to its end."""
        folder.mkdir()
        environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, str(ROOT / "run_sft.py"), *self.arguments]
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        while not (folder / "log").stat().st_size and process.poll() is None:
            time.sleep(0.01)
        begun = time.monotonic()
        if process.wait(PATIENCE):
            raise RuntimeError((folder / "log").read_text(encoding="utf-8"))
        return time.monotonic() - begun


# ------------------------------------------------------------------------------------------------------------ the kills


@dataclass
class Moment:
    """When to kill: at a share of the undisturbed run's time; in the micro-batches of the step after the n-th entry of
    the log; or while `path` is written, or deleted."""

    share: float = 0.0
    logged: int = 0
    path: str = ""
    deleted: bool = False

    def __str__(self) -> str:
        if self.path:
            return f"{self.path} {'deleted' if self.deleted else 'written'}"
        return f"in the step after log entry {self.logged}" if self.logged else f"at {self.share:.0%} of the time"

    def wait(self, folder: Path, process: Any, seconds: float) -> None:
        """Returns when it has come, or when the process has ended."""
        if self.path:
            wanted = folder / self.path
            near = folder / BEFORE if self.is_small else wanted.parent
            self.until(near.exists, process, pause=0.001)
            if self.is_small:
                wanted.unlink(missing_ok=True)
                os.mkfifo(wanted)
                self.until(lambda: waits_in_fifo(process.pid), process, pause=0.001)
            elif self.deleted:
                self.until(lambda: _bytes(wanted), process)
                self.until(lambda: not _bytes(wanted), process)
            else:  # the answers come one by one, for a second or more; the rest takes milliseconds
                self.until(wanted.exists, process, pause=0.001 if near.name == "out" else 0)
        elif self.logged:
            log = folder / "log"
            self.until(lambda: log.exists() and log.read_bytes().count(b"  loss ") >= self.logged, process, pause=0.001)
            time.sleep(0.03)  # the step after it has begun
        else:
            process.join(self.share * seconds)

    @property
    def is_small(self) -> bool:
        """Whether the file is written faster than this process may see it; a FIFO in its place holds the run up."""
        return re.fullmatch(r"out/\.\w+\.\w+\.partial", self.path) is not None

    @staticmethod
    def until(come: Any, process: Any, pause: float = 0) -> None:
        """Without a pause it looks all the time: a small file is written in a millisecond."""
        looks = 0
        while not come():
            looks += 1
            if (pause or looks % 1000 == 0) and process.exitcode is not None:
                return
            if pause:
                time.sleep(pause)


def waits_in_fifo(pid: int) -> bool:
    """Whether a process has opened a FIFO to write to it; Linux lets it wait for a reader."""
    try:
        return Path(f"/proc/{pid}/wchan").read_text(encoding="utf-8") == "wait_for_partner"
    except OSError:
        return False


def being_written(folder: Path, reference: Path) -> list[str]:
    """What a killed run left half-written: paths below `folder`, with their size and what it is in the end."""
    found = []
    names = {path.name for path in next(reference.glob("out/checkpoint-*")).iterdir()}
    for checkpoint in sorted(folder.glob("out/checkpoint-*")):
        sizes = {path.name: _bytes(path) for path in checkpoint.iterdir()}
        if not sizes.pop("checksums.json", 0):
            missing = len(names - sizes.keys())
            last = max(sizes, key=lambda name: (checkpoint / name).stat().st_ctime_ns, default="none")
            found.append(f"out/{checkpoint.name} ({missing} files missing, last {last}, {sizes.get(last, 0):,} bytes)")
    for path in sorted([*folder.glob("out/.*partial"), *folder.glob("out/.*.old"), *folder.glob("cache/*/.*.partial")]):
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        found.append(f"{path.relative_to(folder)} ({len(files)} files, {sum(map(_bytes, files)):,} bytes)")
    found += [f"out/{path.name} ({_bytes(path):,} bytes)" for path in folder.glob("out/predictions.partial.jsonl")]
    return found


def _bytes(path: Path) -> int:
    """0: it is not there, or not any more."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def moments(name: str, steps: int, random_: random.Random) -> Iterator[list[Moment]]:
    """Ten kills a case, in eight runs, of which two are killed twice in a row."""
    weights = "model.safetensors" if name == "full" else "adapter_model.safetensors"
    every = steps // EPOCHS if "best" in name else 2
    early, late = f"out/checkpoint-{every}", f"out/checkpoint-{steps - steps % every - every}"
    files = [f"{early}/{weights}", f"{early}/optimizer.pt", f"{late}/rng_state.pth", f"{late}/trainer_state.json"]
    adapter, model = "out/.trained.partial/adapter_model.safetensors", "out/.final_model.partial/model.safetensors"
    trained = [adapter] if "export.merge=false" in CASES[name] else [model] if name == "full" else [adapter, model]
    results = ["out/predictions.partial.jsonl", "out/.scores.json.partial", "out/.loss.png.partial"]
    results += ["out/.report.html.partial", "out/.training_config.json.partial"]
    random_.shuffle(results)
    yield [Moment(path=random_.choice(files))]
    yield [Moment(path=results[0])]
    yield [Moment(share=random_.uniform(0, FORKED)), Moment(path=trained[-1])]
    yield [Moment(logged=random_.choice([1, 3]))]
    old = f"out/checkpoint-{2 * every}" if "best" in name else early  # the best, the first, is never deleted
    yield [Moment(path=f"{old}/checksums.json", deleted=True)]
    yield [Moment(path=results[1])]
    yield [Moment(share=random_.uniform(0, FORKED))]
    yield [Moment(path=random_.choice(files)), Moment(path=random_.choice([trained[0], results[2]]))]


def kill(runs: Runs, folder: Path, moment: Moment, seconds: float, reference: Path) -> tuple[str, bool]:
    """Starts a run and kills it. Returns: what it was at, and whether that is what was asked for."""
    log = folder / "log"
    before = log.stat().st_size if log.exists() else 0
    process = runs.start(folder)
    Moment.until(lambda: log.exists() and log.stat().st_size > before, process, pause=0.001)
    moment.wait(folder, process, seconds)
    process.kill()
    process.join()
    if (folder / moment.path).is_fifo():
        (folder / moment.path).unlink()
        whole = (reference / "out" / Path(moment.path).name[1:].removesuffix(".partial")).read_bytes()
        if process.exitcode:
            (folder / moment.path).write_bytes(whole[: len(whole) // 2])
    found = being_written(folder, reference)
    asked = "/".join(moment.path.split("/")[:2])
    if found or process.exitcode == 0:
        return "; ".join(found) or "nothing: it had ended", any(each.startswith(asked) for each in found)
    said = (folder / "log").read_text(encoding="utf-8", errors="replace") if (folder / "log").exists() else ""
    done = sorted((path.name for path in folder.glob("out/checkpoint-*")), key=lambda name: int(name[11:]))
    doing = "before training" if "training " not in said else f"after {done[-1]}" if done else "before a checkpoint"
    return f"no file ({doing})", not asked


# ------------------------------------------------------------------------------------------------------- the comparison


def content(path: Path) -> bytes:
    """What must be equal of a file."""
    if path.name == "training_config.json":
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("resources", None)
        return json.dumps(config).encode()
    if path.name == "checksums.json":
        sums = json.loads(path.read_text(encoding="utf-8"))
        return json.dumps({**sums, "trainer_state.json": ""}).encode()
    if path.name == "trainer_state.json":
        state = json.loads(path.read_text(encoding="utf-8"))
        entries = [entry for entry in state["log_history"] if "train_runtime" not in entry]
        kept = [{key: value for key, value in entry.items() if not TIMES.search(key)} for entry in entries]
        return json.dumps({**state, "log_history": kept}).encode()
    if path.name == "report.html":
        return re.sub(rb'<h2 id="resources">.*?(?=<h2)', b"", path.read_bytes(), flags=re.S)
    return path.read_bytes()


def differences(folder: Path, other: Path) -> list[str]:
    """Files that one has alone, or that are not equal."""
    one, two = ({path.relative_to(each) for path in each.rglob("*") if path.is_file()} for each in (folder, other))
    alone = [f"{path} is in {'the first' if path in one else 'the second'} only" for path in sorted(one ^ two)]
    return alone + [str(path) for path in sorted(one & two) if content(folder / path) != content(other / path)]


# ----------------------------------------------------------------------------------------------------------- the table


def hold_case(name: str, limit: int, random_: random.Random, folder: Path, inputs: Path) -> tuple[int, int]:
    """Returns: kills, `limit` or one more, and how many of them ended equal."""
    arguments = [str(inputs / "recipe.yaml"), *CASES[name]]
    runs = Runs(folder, arguments)
    folder.mkdir()
    seconds = runs.undisturbed(folder / "reference")
    state = json.loads((folder / "reference/out/trainer_state.json").read_text(encoding="utf-8"))
    kills = equal = 0
    for number, wanted in enumerate(moments(name, state["max_steps"], random_)):
        if kills >= limit:
            break
        run = folder / f"kill{number}"
        run.mkdir()
        hits = [kill_at(runs, run, moment, seconds, folder / "reference") for moment in wanted]
        said = runs.finish(run)
        went_on = re.search(r"(?:going on from|taking up) out/(\S+)", said)
        unlike = differences(folder / "reference" / "out", run / "out")
        kills, equal = kills + len(hits), equal + len(hits) * (not unlike)
        end = f"{went_on[1] if went_on else 'the start'} | {'; '.join(unlike[:4]) or 'equal'} |"
        for moment, hit in zip(wanted, hits, strict=True):
            print(f"| {name} | {moment} | {hit} | {end}", flush=True)
        if not unlike:
            shutil.rmtree(run)
    return kills, equal


def kill_at(runs: Runs, run: Path, moment: Moment, seconds: float, reference: Path) -> str:
    """Kills a run where the moment says, from what lies in its folder before; after TRIES, wherever it was."""
    before = run.with_name("before")
    shutil.copytree(run, before)
    for left in reversed(range(TRIES)):
        hit, is_asked = kill(runs, run, moment, seconds, reference)
        if is_asked or not left:
            break
        moment.share *= 0.8  # a run that is faster than the undisturbed one had ended
        shutil.rmtree(run)
        shutil.copytree(before, run)
    shutil.rmtree(before)
    return hit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", choices=CASES, help="one alone")
    parser.add_argument("--folder", type=Path, help="where to work; what differs stays there")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    make = Runs(folder, []).context.Process(target=make_inputs, args=(folder,))
    make.start()
    make.join()
    begun, kills, equal = time.monotonic(), 0, 0
    for number, name in enumerate(CASES):
        if kills < options.kills and options.case in (None, name):
            random_ = random.Random(f"{options.seed}: {name}")
            done, well = hold_case(name, min(10, options.kills - kills), random_, folder / str(number), folder)
            kills, equal = kills + done, equal + well
    print(f"{equal} of {kills} equal, {time.monotonic() - begun:.0f} s")
    sys.exit(equal != kills)


if __name__ == "__main__":
    main()
