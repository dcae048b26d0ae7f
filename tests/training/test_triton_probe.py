"""The probe of Triton, in processes of their own, with the C compiler and Python.h there and missing.

There is no GPU here, so Triton is a stand-in: its launch compiles a piece of C that includes Python.h, as Triton's does
at its first launch, with the compiler that it finds on PATH, and writes where the kernel would.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRITON = """
    import os, pathlib, shutil, subprocess, sysconfig

    def jit(function):
        class Kernel:
            def __getitem__(self, grid):
                return launch
        return Kernel()

    def launch(pointer):
        with open("launches", "a", encoding="utf-8") as file:
            file.write("x")
        compiler = shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
        pathlib.Path("main.c").write_text("#include <Python.h>", encoding="utf-8")
        include = os.environ.get("INCLUDE_HERE") or sysconfig.get_paths()["include"]
        subprocess.check_call([compiler, "-fsyntax-only", "-I", include, "main.c"])
        pointer.fill_(1)
"""
PROBE = """
    import torch

    zeros = torch.zeros
    torch.zeros = lambda *size, device, **options: zeros(*size, **options)
    torch.cuda.synchronize = lambda: None
    from sft.training.triton_probe import why_triton_fails

    print(why_triton_fails(), why_triton_fails(), sep="|")
"""


def probe(folder, **environment):
    """What the probe says, asked twice, and how often a kernel was launched for it."""
    (folder / "triton").mkdir(exist_ok=True)
    (folder / "triton/__init__.py").write_text(textwrap.dedent(TRITON), encoding="utf-8")
    (folder / "triton/language.py").write_text("", encoding="utf-8")
    (folder / "launches").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROBE)],
        cwd=folder,
        env={"PYTHONPATH": f"{folder}:{ROOT}", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().split("|")
    assert first == second
    return first, len((folder / "launches").read_text(encoding="utf-8"))


@pytest.mark.skipif(sys.platform == "win32", reason="Triton's own wheels are for Linux")
def test_a_missing_compiler_or_header_is_found_by_one_launch(tmp_path):
    compiler = shutil.which("gcc") or shutil.which("clang")
    assert probe(tmp_path, PATH="") == (
        "Failed to find C compiler. Please specify via CC environment variable.",
        1,
    )
    if compiler is None:
        pytest.skip("there is no C compiler here")
    said, launches = probe(tmp_path, PATH=os.environ["PATH"], INCLUDE_HERE=str(tmp_path))
    assert "-fsyntax-only" in said and "returned non-zero exit status" in said and launches == 1
    assert probe(tmp_path, PATH=os.environ["PATH"]) == ("None", 1)
