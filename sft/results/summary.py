"""The summary of a run for the terminal, from the files of its output_dir alone."""

import textwrap
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size

from sft.results.curves import curves_of, score_curves
from sft.results.forgetting import general_line
from sft.results.replies import GROUPS, Reply, choose_replies, first_of_each_group
from sft.results.run_folder import read_run
from sft.results.scores import Scores
from sft.results.words import JOINERS, message_text, number, plain, score_table, scored_model, story

COLUMNS = 80  # of the terminal


def run_summary(output_dir: Path) -> str:
    """The run in a screenful of at most 80 columns. Raises: UserError: output_dir is no folder of a run."""
    run = read_run(output_dir)
    parts = [textwrap.fill(_fit(story(run), 8 * COLUMNS).rstrip(), COLUMNS), "\n".join(_loss_lines(run.log))]
    if run.scores:
        parts.append("\n".join(score_lines(run.scores)))
    parts += ["\n".join(_reply_lines(reply)) for reply in first_of_each_group(choose_replies(run))]
    names = ("report.html", "loss.png", "lora_adapter", "final_model", "scores.json", "predictions.jsonl")
    found = [name + "/" * (output_dir / name).is_dir() for name in names if (output_dir / name).exists()]
    files = textwrap.fill("  ".join(found), COLUMNS, initial_indent="  ", subsequent_indent="  ")
    parts.append(f"in {plain(output_dir)}:\n{files}")
    if (output_dir / "report.html").exists():
        parts.append(f"next: python -m webbrowser {plain(output_dir / 'report.html')}")
    return "\n\n".join(part for part in parts if part)


def _loss_lines(log: list[dict[str, Any]]) -> Iterator[str]:
    curves = curves_of(log, "Loss")
    if not any(len(curve.values) for curve in curves.values()):
        return
    yield f"{'loss':<16}{'first':>12}{'last':>12}"
    scores = {f"{name} (val.)": found for name, found in score_curves(log).items()}
    for name, (_, values) in {**curves, **scores}.items():
        if len(values):
            yield f"  {name:<14}{number(values[0]):>12}{number(values[-1]):>12}"


def score_lines(scores: Scores) -> Iterator[str]:
    """The scores, if there was a test split, and what was forgotten, if that was measured."""
    if scores.get("rows"):
        yield from _score_table_lines(scores)
    if "general" in scores:
        yield textwrap.fill(general_line(scores["general"]), COLUMNS)


def _score_table_lines(scores: Scores) -> Iterator[str]:
    """The table of scores, with what is the same for several of them said once."""
    rows = f"{scores.get('rows', 0):,} answers"
    yield f"{'score':<16}{'before':>12}{'after':>12}  {rows}"
    table = score_table(scores)
    verdicts = [row.verdict for row in table]
    shared = {verdict for verdict in verdicts if verdicts.count(verdict) > 1 and len(verdict) > COLUMNS // 2}
    for row in table:
        before, after = (side[0] if side else "-" for side in (row.before, row.after))
        alone = (row.before or row.after or ("", ""))[1] if not (row.before and row.after) else ""
        verdict = f"95 %: {alone}" if alone else row.verdict
        verdict = "" if verdict in shared else _fit(verdict, 2 * COLUMNS).rstrip()
        line = f"  {_fit(row.name, 14)}{before:>12}{after:>12}  {verdict}".rstrip()
        yield textwrap.fill(line, COLUMNS, subsequent_indent=" " * 42)
    for verdict in sorted(shared):  # what is the same for several scores is said once
        names = ", ".join(row.name for row in table if row.verdict == verdict)
        yield textwrap.fill(f"  {names}: {_fit(verdict, 3 * COLUMNS).rstrip()}", COLUMNS, subsequent_indent="  ")
    if model := scored_model(scores):
        yield f"  {model}"


def _reply_lines(reply: Reply) -> Iterator[str]:
    row, messages = reply.row, reply.row.get("messages")
    texts = (
        ("asked", message_text(messages[-1]) if messages else ""),
        ("wanted", row.get("reference")),
        ("before", row.get("base")),
        ("after", row.get("tuned")),
    )
    yield _fit(f"{GROUPS[reply.group]}, {row.get('row')}", COLUMNS).rstrip()
    for label, text in texts:
        if text is not None:
            yield f"  {label:<8}{_fit(text, COLUMNS - 10)}".rstrip()


def _fit(text: str, columns: int) -> str:
    """A text on one line, cut or padded to so many columns of a terminal, in which a Chinese letter takes two.

    >>> _fit("one\\n two", 9), _fit("one two", 5), _fit("世界", 5)
    ('one two  ', 'one …', '世界 ')
    """
    text = " ".join("".join(c for c in plain(text) if unicodedata.category(c) != "Cf" or c in JOINERS).split())
    if cell_len(text) > columns:
        text = set_cell_size(text, columns - 1) + "…"
    return set_cell_size(text, columns)
