"""The summary of a run for the terminal, from the files of its output_dir alone, and that of a comparison."""

import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size

from sft.results.comparison import LETTERS, Comparison, Difference, headline
from sft.results.curves import curves_of, score_curves
from sft.results.forgetting import general_line
from sft.results.replies import GROUPS, Reply, choose_replies, first_of_each_group
from sft.results.run_folder import read_run
from sft.results.scores import Scores
from sft.results.words import JOINERS, message_text, number, plain, rounded, score_table, scored_model, story

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


def comparison_summary(comparison: Comparison, page: Path) -> str:
    """The comparison in at most 80 columns."""
    runs = zip(LETTERS, comparison.runs, comparison.left_out, strict=False)
    heads = [
        f"{letter}  {_fit(str(run.folder), 46)}" + (f"  {left:>6,} answers left out" if left else "")
        for letter, run, left in runs
    ]
    parts = ["\n".join(map(str.rstrip, heads)), _filled(headline(comparison), "")]
    parts += [_filled(f"note: {note}") for note in comparison.notes]
    parts.append("\n".join(_compared_lines(comparison)))
    for title, rows in (
        ("recipe", comparison.recipe),
        ("origin", comparison.origin),
        ("training", comparison.training),
    ):
        if rows:
            parts.append("\n".join([title, *_difference_lines(rows)]))
    return "\n\n".join([*parts, f"wrote {plain(page)}\nnext: python -m webbrowser {plain(page)}"])


def _compared_lines(comparison: Comparison) -> Iterator[str]:
    yield f"{'score':<16}{'':>4}{'':>8}  95 % interval   against A"
    for score in comparison.scores:
        sides = zip(LETTERS, score.entries, [None, *score.against], strict=False)
        for letter, entry, against in sides:
            shown = rounded(entry, score.entries) or ("-", "")
            line = f"  {_fit(score.name if letter == 'A' else '', 14)}{letter:>4}{shown[0]:>8}  {_fit(shown[1], 14)}"
            line += f"  {against.verdict}" if against else ""
            yield _filled(line.rstrip(), " " * 46)


def _difference_lines(rows: Sequence[Difference]) -> Iterator[str]:
    for key, values in rows:
        sides = [f"{letter} {value}" for letter, value in zip(LETTERS, values, strict=False)]
        line = f"  {key:<28}  {'  '.join(f'{side:<12}' for side in sides)}".rstrip()
        if cell_len(line) <= COLUMNS:
            yield plain(line)
        else:
            yield f"  {_fit(key, COLUMNS - 2)}".rstrip()
            yield from (f"     {_fit(side, COLUMNS - 5)}".rstrip() for side in sides)


def _filled(text: str, indent: str = "  ") -> str:
    return textwrap.fill(plain(text), COLUMNS, subsequent_indent=indent)


def _fit(text: str, columns: int) -> str:
    """A text on one line, cut or padded to so many columns of a terminal, in which a Chinese letter takes two.

    >>> _fit("one\\n two", 9), _fit("one two", 5), _fit("世界", 5)
    ('one two  ', 'one …', '世界 ')
    """
    text = " ".join("".join(c for c in plain(text) if unicodedata.category(c) != "Cf" or c in JOINERS).split())
    if cell_len(text) > columns:
        text = set_cell_size(text, columns - 1) + "…"
    return set_cell_size(text, columns)
