"""Everything that only a GPU can show: pass, fail, or what this machine lacks. Five and a half minutes on an H200.

    python benchmarks/gpu.py [--only NAME ...] [--out FILE] [--folder FOLDER]

Nothing is fetched: the models are random, Qwen2.5-7B and ChatGLM3-6B at their real sizes among them, and the tokenizers
those of the tests, so requirements-dev.txt must be installed. FOLDER takes 17 GB at a time (/dev/shm where the disk
is slow and memory plenty); without it they go to the system's temporary folder. Two checks run only when they are
named, with 30 GB in FOLDER: whole_qwen_qlora and whole_chatglm3_4bit take both recipes for a GPU, with models of their
real size, from the command to the page; two minutes each.

A line is printed as soon as it is known; at the end comes all of it as JSON. Exit code 1: something failed. On a CPU
the same checks run on tiny shapes, so that they do not rot.

The checks run in a process beside this one, which is ended when a check takes longer than its limit, and begun anew
after a failure, since an error of CUDA leaves a process useless.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_checks.line import FAIL, NOT_HERE, PASS, Line  # noqa: E402 - the path above comes first

# Each check: a generator of lines, and its limit in seconds on a GPU; with the first start these make 625.
START_SECONDS = 60  # of imports, where the disk is cold
CHECKS = {
    "machine": ("benchmarks.gpu_checks.machine:machine", 20),
    "loss": ("benchmarks.gpu_checks.exact:loss", 25),
    "packing_sdpa": ("benchmarks.gpu_checks.exact:packing_sdpa", 10),
    "packing_varlen": ("benchmarks.gpu_checks.exact:packing_varlen", 10),
    "packing_flex": ("benchmarks.gpu_checks.exact:packing_flex", 40),
    "packing_flash": ("benchmarks.gpu_checks.exact:packing_flash", 10),
    "qwen_qlora": ("benchmarks.gpu_checks.speed:qwen_qlora", 100),
    "chatglm3_4bit": ("benchmarks.gpu_checks.speed:chatglm3_4bit", 100),
    "answers": ("benchmarks.gpu_checks.answers:answers", 40),
    "whole_run": ("benchmarks.gpu_checks.runs:whole_run", 90),
    "torchrun": ("benchmarks.gpu_checks.runs:torchrun", 60),
    "fsdp2": ("benchmarks.gpu_checks.runs:fsdp2", 60),
}
# Only when they are named.
MORE_CHECKS = {
    "whole_qwen_qlora": ("benchmarks.gpu_checks.runs:whole_qwen_qlora", 240),
    "whole_chatglm3_4bit": ("benchmarks.gpu_checks.runs:whole_chatglm3_4bit", 240),
}
MODULES = dict.fromkeys(entry.partition(":")[0] for entry, _ in CHECKS.values())
ON_CPU_SECONDS = 180  # of each check: a CPU may be busy with other things

Message = dict[str, Any]


# ---------------------------------------------------------------------------------------------- the process beside it


def serve(pipe: Connection, log: str, folder: str, modules: Iterable[str]) -> None:
    """Runs the checks that it is told, one after another. What libraries print goes to the log."""
    stream = open(log, "a", encoding="utf-8", buffering=1)  # for the life of the process
    for descriptor in (1, 2):
        os.dup2(stream.fileno(), descriptor)
    import torch

    for module in modules:
        importlib.import_module(module)  # before the first check's clock runs: on a virtual machine 20 s
    pipe.send(torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    while (entry := pipe.recv()) is not None:
        for message in lines_of(entry, Path(folder)):
            pipe.send(message)
        pipe.send(None)


def lines_of(entry: str, folder: Path) -> Iterator[Message]:
    """The lines of a check, each with its seconds; one that raises has failed, and the traceback is kept."""
    begun = time.perf_counter()
    module, _, function = entry.partition(":")
    try:
        for line in getattr(importlib.import_module(module), function)(folder):
            yield {**asdict(line), "seconds": time.perf_counter() - begun}
            begun = time.perf_counter()
    except Exception as error:  # whatever it is, the next check is still worth running
        last = traceback.format_exception_only(error)[-1].strip().splitlines()[-1]
        failed = Line("", FAIL, last, {"traceback": traceback.format_exc()})
        yield {**asdict(failed), "seconds": time.perf_counter() - begun}


class Worker:
    """The process that runs the checks; after a failure a new one."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "worker.log"
        self._process: Any = None
        self._pipe: Any = None

    def start(self, until: float) -> str | None:
        """Args: until: on the monotonic clock. Returns: the GPU's name; None: there is none."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, str(self.log), str(self.folder), tuple(MODULES)))
        self._process.start()
        theirs.close()
        return self._next(until)

    def run(self, entry: str, limit_seconds: float) -> Iterator[Message]:
        """The lines of a check, with one more where it was ended, or ended its process."""
        begun, failed = time.monotonic(), False
        try:
            if self._process is None:
                self.start(begun + max(START_SECONDS, limit_seconds))
            begun = time.monotonic()
            self._pipe.send(entry)
            while (message := self._next(begun + limit_seconds)) is not None:
                failed |= message["outcome"] == FAIL
                yield message
        except TimeoutError:
            self.kill()
            yield self._ended(f"ended after {time.monotonic() - begun:.0f} s, its limit", begun)
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self.kill()
            yield self._ended(f"its process ended with exit code {code}", begun)
        if failed:
            self.close()

    def _next(self, until: float) -> Any:
        """What the process sends. Raises: TimeoutError: nothing till then; EOFError: it is no more."""
        if not self._pipe.poll(max(0.0, until - time.monotonic())):
            raise TimeoutError
        return self._pipe.recv()

    def _ended(self, why: str, begun: float) -> Message:
        numbers = {"log": self.log.read_text(encoding="utf-8", errors="replace")[-4000:]}
        return {**asdict(Line("", FAIL, why, numbers)), "seconds": time.monotonic() - begun}

    def close(self) -> None:
        """Lets the process end by itself, between two checks."""
        if self._process is not None and self._process.is_alive():
            self._pipe.send(None)
            self._process.join(10)
        self.kill()

    def kill(self) -> None:
        """Ends the process and all that it has started."""
        if self._process is None:
            return
        children = psutil.Process(self._process.pid).children(recursive=True) if self._process.is_alive() else []
        self._process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self._process.join()
        self._process = None


# ------------------------------------------------------------------------------------------------------- all of them


def run_checks(
    names: list[str], folder: Path, checks: dict[str, tuple[str, int]] = CHECKS | MORE_CHECKS
) -> Iterator[Message]:
    """Runs checks by name, prints each line, and yields it.

    Args: checks: by name, "module:generator" and the limit in seconds.
    """
    worker, begun = Worker(folder), time.monotonic()
    try:
        gpu = worker.start(begun + ON_CPU_SECONDS)
        print(f"GPU: {gpu}" if gpu else "This is a CPU: the shapes are tiny, and the figures mean nothing.", flush=True)
        limits = {name: checks[name][1] if gpu else max(checks[name][1], ON_CPU_SECONDS) for name in names}
        for name in names:
            for message in worker.run(checks[name][0], limits[name]):
                what = f"{name} {message['part']}".strip()
                print(
                    f"{message['outcome']:<8}  {what:<44}{message['seconds']:>6.1f} s  {message['figure']}", flush=True
                )
                yield {"check": name, **message}
        worker.close()
    finally:
        worker.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=CHECKS | MORE_CHECKS, default=list(CHECKS))
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--folder", type=Path, help="where the models are written; they are deleted")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `timeout`, too, leaves nothing behind
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="gpu-check-") as scratch:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{scratch}/cache", "TOKENIZERS_PARALLELISM": "true"}
        lines = list(run_checks(options.only, Path(scratch)))
    counts = Counter(line["outcome"] for line in lines)
    print(", ".join(f"{counts[outcome]} {outcome}" for outcome in (PASS, FAIL, NOT_HERE)))
    report = json.dumps({"counts": counts, "lines": lines}, ensure_ascii=False, indent=1)
    print(report)
    if options.out:
        options.out.write_text(report + "\n", encoding="utf-8")
    return 1 if counts[FAIL] or not lines else 0


if __name__ == "__main__":
    sys.exit(main())
