"""Every broken input of tests/garbage.py, the heavy ones too, each in a process of its own.

    python benchmarks/garbage.py

Prints for each reader how many inputs got one clear answer, and the most time and memory that one took. With words,
only the inputs whose reader or name holds one of these; with --messages, what was answered. POSIX only (fork).
"""

import argparse
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ADDRESSES = 12 * 2**30  # bytes that a process may ask for, so that none takes the machine down
TIME_LIMIT = 60  # seconds, after which a process is killed


def answer(case, base, folder, pipe):
    """In the process of its own: runs a case, and tells the exit code, stderr, what was left, seconds and bytes."""
    import datasets

    import run_sft
    from sft.model.machine import peak_memory_bytes
    from tests.garbage import arguments_of, lay_out, tree

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    lay_out(case, base, folder)
    os.chdir(folder)
    datasets.config.HF_DATASETS_CACHE = folder.parent / "cache"
    tempfile.tempdir = str(folder)
    stderr, stdout = folder.parent / "stderr", folder.parent / "stdout"
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), number)
    before, peak, begun = tree(folder), peak_memory_bytes(), time.perf_counter()
    try:
        code = run_sft.main(arguments_of(case))
    except BaseException as error:  # whatever it is, it is the answer
        traceback.print_exc()
        code = error.code if isinstance(error, SystemExit) else type(error).__name__
    sys.stderr.flush()
    seconds = time.perf_counter() - begun
    left = sorted(name for name, _ in tree(folder).items() ^ before.items())
    message = stderr.read_text(encoding="utf-8", errors="replace")
    pipe.send((code, message, left, seconds, peak_memory_bytes() - peak))


def run_apart(case, base):
    """What `answer` tells; of a process that was killed, or died, that."""
    folder = Path(tempfile.mkdtemp(prefix="garbage."))
    (folder / "work").mkdir()
    ours, theirs = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=answer, args=(case, base, folder / "work", theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(TIME_LIMIT):
            process.kill()
            return f"no end in {TIME_LIMIT} s", "", [], float(TIME_LIMIT), 0
        return ours.recv()
    except EOFError:
        return "died", "", [], 0.0, 0
    finally:
        process.join()
        shutil.rmtree(folder, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--messages", action="store_true")
    options = parser.parse_args()
    from tests.garbage import CASES, MEMORY, SECONDS, faults, make_base

    base = Path(tempfile.mkdtemp(prefix="garbage."))
    make_base(base)
    by_reader = defaultdict(list)
    for case in CASES:
        if options.words and not any(word in f"{case.reader}: {case.name}" for word in options.words):
            continue
        code, message, left, seconds, memory = run_apart(case, base)
        found = faults(case, code, message, left)
        found += [f"took {seconds:.0f} s"] * (seconds > SECONDS) + [f"took {memory >> 20} MiB"] * (memory > MEMORY)
        by_reader[case.reader].append((case, found, seconds, memory))
        if found or options.messages:
            print(f"\n{case.reader}: {case.name} ({seconds:.1f} s){''.join(f'; {each}' for each in found)}", flush=True)
            print(message[-1500:], flush=True)
    print(f"\n{'reader':<18}{'broken':>8}{'answered':>10}{'odd':>6}{'passed':>8}{'seconds':>9}{'MiB':>6}")
    for reader, ran in by_reader.items():
        print(f"{reader:<18}{counts(ran)}")
    print(f"{'all':<18}{counts([each for ran in by_reader.values() for each in ran])}")
    shutil.rmtree(base, ignore_errors=True)
    return any(found for ran in by_reader.values() for _, found, _, _ in ran)


def counts(ran):
    """Of broken inputs and of odd ones: how many there are and how many were right; the most seconds and MiB of one."""
    columns = []
    for broken in (True, False):
        right = [not found for case, found, _, _ in ran if (case.says is not None) == broken]
        columns += [len(right), sum(right)]
    seconds, memory = max(each[2] for each in ran), max(each[3] for each in ran)
    return f"{columns[0]:>8}{columns[1]:>10}{columns[2]:>6}{columns[3]:>8}{seconds:>9.1f}{memory >> 20:>6}"


if __name__ == "__main__":
    sys.exit(main())
