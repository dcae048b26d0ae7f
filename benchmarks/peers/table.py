"""OUT/runs.jsonl -> OUT/table.md and OUT/table.json."""

import json
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.flops import Weights
from benchmarks.peers.cases import CASES
from benchmarks.peers.tools import TOOLS

SAME_LOSS = 0.02
OTHERS = 0.25  # cores; a run during which others used more is left out
HEAD = (
    "| tool | real tokens/s | supervised tokens/s | ours is faster | peak memory | of the matmul rate | "
    "loss of the first step | runs |\n|---|---|---|---|---|---|---|---|"
)


def written(out: Path) -> str:
    """Writes both tables; gives the Markdown."""
    machine = json.loads((out / "machine.json").read_text(encoding="utf-8"))
    runs = [json.loads(line) for line in (out / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = summary(runs, machine["flops"])
    (out / "table.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2), encoding="utf-8")
    text = markdown(rows, machine)
    (out / "table.md").write_text(text, encoding="utf-8")
    return text


def summary(runs: list[dict[str, Any]], flops: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each case, dtype and tool, in the order of CASES and TOOLS.

    Args: flops: FLOP/s of a matrix product by dtype.
    """
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        groups.setdefault((run["case"], run["dtype"]), {}).setdefault(run["tool"], []).append(run)
    rows = []
    for case, dtype in sorted(groups, key=lambda key: (list(CASES).index(key[0]), key[1])):
        group = groups[case, dtype]
        for tool in filter(group.__contains__, TOOLS):
            rows.append({"case": case, "dtype": dtype, "tool": tool, **_row(tool, group, CASES[case].lora, flops)})
    return rows


def _row(tool: str, group: dict[str, list[dict[str, Any]]], lora: bool, flops: dict[str, float]) -> dict[str, Any]:
    rounds = _counted(group[tool])
    if not rounds:
        return {"problem": group[tool][-1]["problem"] or "others used the machine in every run"}
    done = list(rounds.values())
    first, own = done[0], _counted(group.get("ours", []))
    speeds = [rate(run, "tokens") for run in done]
    timed = first["steps"][1:]
    supervised = sum(step["supervised"] for step in timed) / sum(step["tokens"] for step in timed)
    needed = Weights(first["linear"], first["lora"], first["head"]).flops_a_token(supervised, lora)
    ratios = [rate(own[number], "tokens") / rate(run, "tokens") for number, run in rounds.items() if number in own]
    return {
        "problem": None,
        "runs": len(done),
        "left_out": len(group[tool]) - len(done),
        "tokens_a_second": spread(speeds),
        "supervised_a_second": spread([rate(run, "supervised") for run in done]),
        "ratio": spread(ratios) if ratios else None,
        "peak_bytes": spread([run["peak_bytes"] for run in done]),
        "share_of_matmul": median(speeds) * needed / flops[first["dtype"]],
        "first_loss": first["steps"][0]["loss"],
        "last_loss": first["steps"][-1]["loss"],
        "loss_differs": why_it_differs(first, next(iter(own.values()))) if own and tool != "ours" else None,
    }


def _counted(runs: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Round -> run, of those that ended and had the machine to themselves."""
    return {n: run for n, run in enumerate(runs) if not run["problem"] and run["others"] <= OTHERS}


def rate(run: dict[str, Any], what: str) -> float:
    """A second, in the median of the steps but the first, from the end of one to that of the next."""
    steps = run["steps"]
    return median(step[what] / (step["time"] - before["time"]) for before, step in pairwise(steps))


def spread(values: list[float]) -> list[float]:
    """[median, least, most]"""
    return [median(values), min(values), max(values)]


def why_it_differs(run: dict[str, Any], own: dict[str, Any]) -> str:
    """What parts the first step from that of ours, by what both trained on; loss and counts are those of one batch."""
    step, ours = run["steps"][0], own["steps"][0]
    off = step["loss"] / ours["loss"] - 1
    more = step["supervised"] - ours["supervised"]
    if step["tokens"] != ours["tokens"] and CASES[run["case"]].packed:
        why = f"packs other chats into its first row, {step['supervised']} labels for {ours['supervised']}"
    elif step["tokens"] != ours["tokens"]:
        why = f"another text: {step['tokens']} tokens for {ours['tokens']}"
    elif more == run["answers_in_first_step"]:
        why = "trains on a token more an answer, the line break after the stop token"
    elif more > 0 and step["tokens"] - step["supervised"] <= 2 * CASES[run["case"]].rows_a_step:
        why = "takes the loss on all tokens"
    elif more:
        why = f"{step['supervised']} labels for {ours['supervised']}"
    else:
        why = "the same tokens and labels"
    return f"{off:+.1%}: {why}" if abs(off) > SAME_LOSS or more else f"{off:+.1%}"


def markdown(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    bf16 = "avx512_bf16" if machine["avx512_bf16"] else "no avx512_bf16"
    rates = ", ".join(f"{flops / 1e9:,.0f} GFLOP/s in {name}" for name, flops in machine["flops"].items())
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {bf16}, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB; a matrix product reaches {rates}."
    ]
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
        known = CASES[case]
        rows_a_step = f"{known.rows_a_step} {'packed row' if known.packed else 'row'}{'s' * (known.rows_a_step > 1)}"
        lines += [
            "",
            f"**{case}**: {known.what}; {rows_a_step} a step, {known.steps - 1} steps timed, {dtype}",
            "",
            HEAD,
        ]
        lines += [_line(row) for row in rows if (row["case"], row["dtype"]) == (case, dtype)]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    label = TOOLS[row["tool"]].label
    if row["problem"]:
        return f"| {label} | " + row["problem"].replace("|", "\\|") + " | | | | | | 0 |"
    loss = f"{row['first_loss']:.4f}" + (f" ({row['loss_differs']})" if row["loss_differs"] else "")
    left_out = f", {row['left_out']} left out" if row["left_out"] else ""
    return (
        f"| {label} | {_figure(row['tokens_a_second'])} | {_figure(row['supervised_a_second'])} | "
        f"{_figure(row['ratio'], 2) if row['ratio'] and row['tool'] != 'ours' else ''} | "
        f"{row['peak_bytes'][0] / 1e9:.1f} GB | {row['share_of_matmul']:.0%} | {loss} | {row['runs']}{left_out} |"
    )


def _figure(values: list[float], digits: int = 0) -> str:
    middle, least, most = (f"{value:,.{digits}f}" for value in values)
    return middle if least == most else f"{middle} ({least} to {most})"
