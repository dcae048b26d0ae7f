"""Known advisories against the pinned packages, by pip-audit: told, and never a reason to fail.

An advisory that came out today says nothing about the commit that CI looks at, and PyPI cannot be reached from
everywhere. So this exits with 0 and says which it was: nothing known, these are known, or not looked up.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

PIP_AUDIT = "pip-audit==2.10.1"
SECONDS = 60  # for each of the commands
ROOT = Path(__file__).resolve().parents[1]


def told(report: str) -> list[str]:
    """Lines for the log from pip-audit's JSON."""
    packages = json.loads(report)["dependencies"]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    lines = []
    for package in packages:
        for found in package.get("vulns", []):
            fixed = ", ".join(found["fix_versions"]) or "none yet"
            lines.append(f"ADVISORY {found['id']}: {package['name']} {package['version']}; fixed in {fixed}")
    if skipped:
        lines.append(
            f"not looked up: {len(skipped)} of {len(packages)} packages, which PyPI's service does not tell about"
        )
    return lines or [f"no known advisory against {len(packages)} packages"]


def audit() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        commands = [
            [sys.executable, "-m", "venv", folder],
            [str(python), "-m", "pip", "install", "-q", PIP_AUDIT],
            [str(python), "-m", "pip_audit", "--no-deps", "--disable-pip", "--format", "json"],
        ]
        commands[-1] += ["--progress-spinner", "off", "--timeout", "10"]
        commands[-1] += [f"-r{ROOT / name}" for name in ("requirements.txt", "requirements-dev.txt")]
        for command in commands:
            try:
                done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=SECONDS)
            except (OSError, subprocess.TimeoutExpired) as error:
                return [f"skipped: {error}"]
            if done.returncode and not done.stdout.startswith("{"):  # it is 1 as well where it found something
                return [f"skipped: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}"]
        return told(done.stdout)


if __name__ == "__main__":
    for line in audit():
        print(f"pip-audit: {line}", flush=True)
