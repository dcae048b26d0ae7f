"""OUT/runs.jsonl -> OUT/table.md and OUT/table.json."""

import json
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers.cases import CASES, Weights
from benchmarks.peers.tools import TOOLS

SAME_LOSS = 0.02
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
    done = [run for run in group[tool] if not run["problem"]]
    if not done:
        return {"problem": group[tool][-1]["problem"]}
    first = done[0]
    ours = [run for run in group.get("ours", []) if not run["problem"]]
    speeds = [rate(run, "tokens") for run in done]
    timed = first["steps"][1:]
    supervised = sum(step["supervised"] for step in timed) / sum(step["tokens"] for step in timed)
    needed = Weights(first["linear"], first["lora"], first["head"]).flops_a_token(supervised, lora)
    # Rounds are paired: what else the machine did while both ran is in neither alone.
    ratios = [rate(own, "tokens") / rate(run, "tokens") for own, run in zip(ours, done, strict=False)]
    return {
        "problem": None,
        "runs": len(done),
        "tokens_a_second": spread(speeds),
        "supervised_a_second": spread([rate(run, "supervised") for run in done]),
        "ratio": spread(ratios) if ratios else None,
        "peak_bytes": spread([run["peak_bytes"] for run in done]),
        "share_of_matmul": median(speeds) * needed / flops[first["dtype"]],
        "first_loss": first["steps"][0]["loss"],
        "last_loss": first["steps"][-1]["loss"],
        "loss_differs": why_it_differs(first, ours[0]) if ours and tool != "ours" else None,
        "others": [run["others"] for run in done],
    }


def rate(run: dict[str, Any], what: str) -> float:
    """A second, in the median of the steps but the first, from the end of one to that of the next.

    The median, since a step in which something else took the machine is two to three times as long.
    """
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
    return (
        f"| {label} | {_figure(row['tokens_a_second'])} | {_figure(row['supervised_a_second'])} | "
        f"{_figure(row['ratio'], 2) if row['ratio'] and row['tool'] != 'ours' else ''} | "
        f"{row['peak_bytes'][0] / 1e9:.1f} GB | {row['share_of_matmul']:.0%} | {loss} | {row['runs']} |"
    )


def _figure(values: list[float], digits: int = 0) -> str:
    middle, least, most = (f"{value:,.{digits}f}" for value in values)
    return f"{middle} ({least} to {most})"
