"""Checks for tests/test_gpu_check.py that go wrong, in a file that a process can import at once."""

import os
import subprocess
import sys
import time

from benchmarks.gpu_checks.line import judged, not_here


def passes(folder):
    yield judged("one", True, "fine")
    yield not_here("two", "no such thing")


def raises(folder):
    yield judged("first", True, "fine")
    raise ValueError("the first line\nthe last line")


def hangs(folder):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "child").write_text(str(child.pid), encoding="utf-8")
    time.sleep(600)
    yield


def dies(folder):
    os._exit(7)
    yield
