"""Faults of the machine in each phase of a run: what it says, and what the same command makes of it afterwards.

    python benchmarks/machine_faults.py [FAULT ...]     (Linux, as root for the full disk; about 10 s a line)

Each line is a run of its own, a fork of this process: the phase, the fault, the exit code, whether the run went on from
a checkpoint when the same command was given again, and whether it ended with the adapter of a run that nothing
happened to. tests/test_machine_faults.py holds one way through it; this is the whole table.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import torch

import run_sft
from tests.test_machine_faults import PHASES, command, digest, fill, hidden, make_job

SECOND = ("validation", "checkpoint", "step")  # phases that are struck the second time that a run comes to them


def limit_memory() -> None:
    """1 GB more than there is room for."""
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**26, held + 2**26))
    torch.ones(2**28)


def raise_signal(name: str) -> Callable[[Path], None]:
    return lambda output: signal.raise_signal(getattr(signal, name))


FAULTS: dict[str, Callable[[Path], object]] = {
    **{name: raise_signal(name) for name in ("SIGINT", "SIGTERM", "SIGHUP")},
    "full disk": lambda output: fill(output.parent),
    "folder gone": lambda output: shutil.rmtree(output, ignore_errors=True),
    "no memory": lambda output: limit_memory(),
}


def forked(arguments: list[str], log: Path, cache: Path, phase: str = "", fault: Callable[[], object] = dict) -> int:
    """run_sft.py in a fork, in which the fault strikes at a phase. Returns: its exit code."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 99
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        datasets.config.HF_DATASETS_CACHE = cache
        if phase:
            owner, name = PHASES[phase]
            real, calls = getattr(owner, name), []

            def struck(*args: object, **kwargs: object) -> object:
                calls.append(name)
                if len(calls) == (2 if phase in SECOND else 1):
                    fault()
                return real(*args, **kwargs)

            setattr(owner, name, struck)
        code = run_sft.main(arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        os._exit(code)


def line_of(job: Path, disk: Path, phase: str, name: str) -> str:
    """A line of the table."""
    output, log = disk / "out", job / "log.txt"
    for left in disk.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    cache = disk / "cache" if phase == "tokenising" else job / "cache"
    arguments = command(job, output, f"export.merge={str(phase == 'merged').lower()}")
    code = forked(arguments, log, cache, phase, lambda: FAULTS[name](output))
    said = log.read_text(encoding="utf-8", errors="replace")
    told = [line for line in said.splitlines() if line.startswith(("error: ", "stopped by"))]
    wrong = ["TRACEBACK"] if "Traceback" in said else []
    wrong += hidden(output) if output.is_dir() else []
    (disk / "filler").unlink(missing_ok=True)
    again = forked(arguments, log, cache)
    said = log.read_text(encoding="utf-8", errors="replace")
    begun = next((words for words in ("going on from", "taking up") if words in said), "from the start")
    equal = again == 0 and digest(output / "lora_adapter") == digest(job / "straight/lora_adapter")
    message = (told or [""])[0].replace(str(output), "OUT")[:100]
    return f"{phase:<11}{name:<12}{code:>4}  {begun:<15}{'equal' if equal else 'OTHER':<6} {' '.join(wrong)} {message}"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder))
        disk = job / "disk"
        disk.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)]).returncode == 0
        try:
            for name in sys.argv[1:] or FAULTS:
                if name == "full disk" and not mounted:
                    print("full disk: not here, mount is not permitted")
                    continue
                for phase in PHASES:
                    print(line_of(job, disk, phase, name), flush=True)
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", str(disk)], check=True)


if __name__ == "__main__":
    main()
