"""Trains the same rows with trl's script, LLaMA-Factory, ms-swift and this repository, and compares what a step takes.

    python benchmarks/train.py --model models/SmolLM2-135M-Instruct --out output/train --runs 5
    python benchmarks/train.py --model ... --out ... --case tiny full --tools ours trl

On the CPU. Each tool runs in an environment of its own (--environments; made when it is first asked for, by the pins in
benchmarks/peers/), as a process of its own, one after the other, round by round. All get the same model, rows, LoRA,
batch and steps (benchmarks/peers/tools.py); --model must speak ChatML, as SmolLM2 does.

A small recorder in the process (benchmarks/peers/record.py) notes when each optimizer step ends and what it trained on.
Tokens a second are those of a run's median step without the first, from the end of the step before it to its own end.
Memory is the most that the tool's processes held (resident) until then, looked at ten times a second.

Each run is added to OUT/runs.jsonl, so that a later call adds rounds; table.md and table.json are made from all of them
(--table makes them again and runs nothing). A run during which others used more than a quarter of a core is left out,
and so is its round in the ratios.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.peers.cases import CASES, answers_of, make_tiny, rows_of, speaks_chatml, weights_of  # noqa: E402
from benchmarks.peers.table import written  # noqa: E402
from benchmarks.peers.tools import HERE, TOOLS, Job, python_of  # noqa: E402 - the path above comes first

LIMIT_SECONDS = 480


def note_machine(path: Path) -> None:
    """This machine, and the FLOP/s of a matrix product on it: the most of all calls, as others may use it too."""
    import torch

    from sft.training.duration import matmul_rate

    flops = {name: matmul_rate("cpu", getattr(torch, name)) for name in ("float32", "bfloat16")}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))["flops"]
        flops = {name: max(flops[name], before[name]) for name in flops}
    facts = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "flops": flops,
    }
    path.write_text(json.dumps(facts), encoding="utf-8")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = dict(line.partition("\t: ")[::2] for line in info.read_text(encoding="utf-8").splitlines())
        fields = [lines.get(f"{name}\t") or lines.get(name) for name in ("model name", "cpu family", "model")]
        return f"{fields[0]}, family {fields[1]}, model {fields[2]}"
    return platform.processor() or platform.machine()


def fast_dtype() -> str:
    import torch

    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def environment(folder: Path) -> dict[str, str]:
    """No GPU, no hub, no cache but the folder's."""
    caches = {name: str(folder / "cache") for name in ("HF_HOME", "HF_DATASETS_CACHE", "MODELSCOPE_CACHE")}
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | caches | offline | {"PYTHONUTF8": "1"}


def run(python: Path, name: str, job: Job) -> dict[str, Any]:
    """One run of a tool: its steps, its memory, and why it did not end, if so."""
    command = [str(python), str(HERE / "record.py"), str(job.folder / "steps.jsonl"), *TOOLS[name].command(job)]
    begun, busy_before, held, own = time.time(), _busy(), [], 0.0
    with open(job.folder / "log.txt", "w", encoding="utf-8") as log:
        process = psutil.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment(job.folder.parent))
        try:
            while process.poll() is None and time.time() - begun < LIMIT_SECONDS:
                size, seconds = _held_by(process)
                held.append((time.time(), size))
                own = max(own, seconds)
                time.sleep(0.1)
            others = (_busy() - busy_before - own) / (time.time() - begun)
            problem = _problem(process.poll(), job.folder / "log.txt")
        finally:
            _end(process)
    records = [json.loads(line) for line in _lines(job.folder / "steps.jsonl")]
    steps = _steps(records)
    until = steps[-1]["time"] if steps else time.time()
    return {
        "case": job.case.name,
        "tool": name,
        "dtype": job.dtype,
        "steps": steps,
        "peak_bytes": max((size for at, size in held if at <= until), default=0),
        "seconds": time.time() - begun,
        "others": others,
        "problem": problem if len(steps) < job.case.steps else None,
    }


def _held_by(process: psutil.Process) -> tuple[int, float]:
    """Bytes and CPU seconds of the process and all that it started; memory that they share is counted for each."""
    size, seconds = 0, 0.0
    try:
        for each in (process, *process.children(recursive=True)):
            size += each.memory_info().rss
            seconds += sum(each.cpu_times()[:2])
    except psutil.NoSuchProcess:  # one that has just ended
        pass
    return size, seconds


def _busy() -> float:
    """CPU seconds that the machine has worked since it started, or that its host kept from it."""
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "steal"))


def _problem(code: int | None, log: Path) -> str:
    """Why it ended early. code: its exit code; None: it runs still."""
    if code is None:
        return f"did not end its steps within {LIMIT_SECONDS} s"
    last = [line for line in _lines(log) if line.strip()][-1:]
    return f"exit code {code}: {''.join(last).strip()[:200]}"


def _end(process: psutil.Popen) -> None:
    """With all that it started; a run takes too long, or this program was stopped."""
    if process.poll() is None:
        for each in (*process.children(recursive=True), process):
            each.kill()
        process.wait()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _steps(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The recorder's lines by optimizer step: a step's loss is the sum of what its batches give of it."""
    steps, batches = [], []
    for record in records:
        if "step" not in record:
            batches.append(record)
            continue
        sums = {key: sum(batch[key] for batch in batches) for key in ("loss", "tokens", "supervised", "places")}
        steps.append({**record, **sums})
        batches = []
    return steps


def compare(options: argparse.Namespace, name: str, tokenizer: Any) -> None:
    """Rounds of a case, each tool once in each."""
    case = CASES[name]
    rows = rows_of(case, tokenizer)
    model = make_tiny(options.model, options.out / "tiny") if case.tiny else options.model
    facts = {"answers_in_first_step": answers_of(rows[: case.rows_a_step]), **vars(weights_of(model))}
    for number in range(options.runs):
        for tool in options.tools:
            folder = options.out / "run"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                result = run(python_of(tool, options.environments), tool, Job(case, model, rows, options.dtype, folder))
            except RuntimeError as error:  # it could not be installed
                result = {"case": name, "tool": tool, "dtype": options.dtype, "steps": [], "problem": str(error)}
            with open(options.out / "runs.jsonl", "a", encoding="utf-8") as stream:
                stream.write(json.dumps(result | facts) + "\n")
            steps = result["steps"]
            said = result["problem"] or f"{steps[-1]['time'] - steps[0]['time']:.1f} s for {len(steps) - 1} steps"
            print(f"{name}, round {number + 1}, {tool}: {said}", file=sys.stderr, flush=True)
            if result["problem"] and (folder / "log.txt").is_file():
                shutil.copy(folder / "log.txt", options.out / f"{name}-{tool}.log")


def train(options: argparse.Namespace, refuse: Callable[[str], NoReturn]) -> None:
    if not (options.model / "config.json").is_file():
        refuse(f"--model: {options.model} holds no model; python -m sft.fetch gets SmolLM2-135M-Instruct")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if not speaks_chatml(tokenizer):
        refuse(f"--model: the chat template of {options.model} is not plain ChatML, which the tools are asked for here")
    options.dtype = options.dtype or fast_dtype()
    options.out.mkdir(parents=True, exist_ok=True)
    note_machine(options.out / "machine.json")
    for name in options.case:
        compare(options, name, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "train")
    parser.add_argument("--environments", type=Path, default=ROOT / "output" / "peers")
    parser.add_argument("--case", nargs="+", choices=CASES, default=["chats"])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--table", action="store_true", help="only the tables, from the runs that are there")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # a run that goes on is ended then
    for name in ("model", "out", "environments"):
        setattr(options, name, getattr(options, name).resolve())
    if not options.table:
        train(options, parser.error)
    if not (options.out / "runs.jsonl").is_file():
        parser.error(f"--out: {options.out} holds no runs")
    print(written(options.out))


if __name__ == "__main__":
    main()
