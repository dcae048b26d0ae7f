"""The README's first run as a person sees it, for docs/: its text, and pictures of the terminal and of the page.

    python benchmarks/first_run.py

Runs recipes/smollm2_cpu.yaml in a pseudo-terminal of 80 columns (some minutes; `python -m sft.fetch` first), and writes
the block in docs/first_run.md, docs/pictures/terminal.svg and, with chromium, docs/pictures/page.png.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.terminals import Terminal  # noqa: E402

RECIPE = "recipes/smollm2_cpu.yaml"
PAGE, PICTURES = ROOT / "docs" / "first_run.md", ROOT / "docs" / "pictures"
BEGIN, END = "```text\n", "```\n"


def run(output: Path) -> list[str]:
    """The lines that are left on the terminal."""
    terminal = Terminal()
    command = [sys.executable, "run_sft.py", RECIPE]
    done = subprocess.run(command, cwd=ROOT, stdout=terminal.outside, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit("\n".join(terminal.left()))
    return terminal.left()


def write_svg(lines: list[str], path: Path) -> None:
    with tempfile.TemporaryFile("w+", encoding="utf-8") as nowhere:
        console = Console(width=80, record=True, file=nowhere, force_terminal=True)
        console.print(Text("\n".join([f"$ python run_sft.py {RECIPE}", *lines])))
        path.write_text(console.export_svg(title="80 columns"), encoding="utf-8", newline="\n")


def write_screenshot(page: Path, path: Path) -> None:
    chromium = shutil.which("chromium") or sys.exit("there is no chromium for page.png; the rest is written")
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        size = ["--window-size=900,1100", f"--screenshot={path}"]
        subprocess.run([chromium, *options, *size, page.as_uri()], check=True, capture_output=True, timeout=120)


def main() -> None:
    output = ROOT / "output" / "smollm2_cpu"
    if output.exists():
        sys.exit(f"{output} is there already; move it away, for a first run")
    lines = run(output)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}{chr(10).join(lines)}\n{END}{after}", encoding="utf-8", newline="\n")
    PICTURES.mkdir(exist_ok=True)
    write_svg(lines, PICTURES / "terminal.svg")
    write_screenshot(output / "report.html", PICTURES / "page.png")


if __name__ == "__main__":
    main()
