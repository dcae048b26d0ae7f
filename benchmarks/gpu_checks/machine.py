"""The device: what it is, what it can do at most, and whether the parts that only a GPU has work on it."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.gpu_checks.line import Line, judged, not_here
from sft.training.duration import matmul_rate
from sft.training.triton_probe import why_triton_fails

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
NAME = torch.cuda.get_device_name() if ON_GPU else "CPU"

# bfloat16 FLOP/s, dense. Source: NVIDIA's data sheets, half of what they give "with sparsity".
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}


def machine(folder: Path) -> Iterator[Line]:
    """Driver, CUDA, compiler, Triton, and the rate of a matrix product."""
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")}
    if ON_GPU:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        figure = f"{NAME}, compute capability {capability}, driver {_driver()}, CUDA {torch.version.cuda}"
        yield judged("driver and CUDA", torch.cuda.is_bf16_supported(), figure, versions=versions)
    else:
        yield not_here("driver and CUDA", f"torch {versions['torch']} sees no GPU")
    compilers = [shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")]
    compiler = f"compiler: {next(filter(None, compilers), 'none')}"
    if why := why_triton_fails() if ON_GPU else "its kernels need a GPU":
        yield not_here("Triton", f"{why}; {compiler}")
    else:
        yield judged("Triton", True, f"a kernel ran; {compiler}")
    rate, known = matmul_rate(DEVICE, torch.bfloat16), _peak_by_name()
    # Less comes of a GPU that another process uses, or that is throttled; then the speeds below mean little.
    figure = f"{rate / 1e12:,.2f} TFLOP/s" + (
        f", {rate / known:.0%} of the data sheet's {known / 1e12:,.0f}" if known else ""
    )
    yield judged("matrix product in bfloat16", not known or rate > 0.5 * known, figure, flops=rate, data_sheet=known)


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown, for want of nvidia-smi"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout.split()[0]


def peak_flops() -> tuple[float, str]:
    """bfloat16 FLOP/s that this device reaches at most, and where the number is from."""
    known = _peak_by_name()
    return (known, "data sheet") if known else (matmul_rate(DEVICE, torch.bfloat16), "a matrix product")


def _peak_by_name() -> float | None:
    return next((peak for part, peak in PEAKS.items() if part in NAME), None)


def sync() -> None:
    """Waits for what was given to the GPU."""
    if ON_GPU:
        torch.cuda.synchronize()
