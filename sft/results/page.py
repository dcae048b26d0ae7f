"""report.html and loss.png, from the files of a run's output_dir alone, and the page that compares several runs.

sft/results/page.html is the page; comparison.html, the other, takes its looks from it. Jinja escapes every value in
them, and `plain` takes out what no page or terminal should be given. They have no script and ask for no other file.
"""

from pathlib import Path

import jinja2
import yaml

from sft.files import write_bytes, write_text, writing
from sft.results.advice import advice
from sft.results.comparison import LETTERS, Comparison, by_spread
from sft.results.comparison import headline as comparison_headline
from sft.results.curves import compared_plots, loss_png, plots
from sft.results.forgetting import general_line, has_forgotten
from sft.results.model_card import write_cards
from sft.results.replies import GROUPS, choose_replies
from sft.results.run_folder import read_run
from sft.results.words import (
    direction,
    headline,
    merge_line,
    message_text,
    notices,
    parity_line,
    plain,
    resources,
    rounded,
    score_table,
    scored_model,
    spelled_out,
    story,
)

SHOWN = 20  # rows whose answers a comparison shows


def write_report(output_dir: Path) -> Path:
    """Writes report.html and loss.png into output_dir, and model cards beside the weights. Returns: the page.

    Raises: UserError: output_dir is no folder of a run, or cannot be written.
    """
    run = read_run(output_dir)
    rows = score_table(run.scores) if run.scores else []
    page = _template("page.html").render(
        run=run,
        name=output_dir.resolve().name,
        story=story(run),
        advice=advice(run, rows),
        headline=headline(run.scores, rows) if run.scores and rows else None,
        score_table=rows,
        scored_model=scored_model(run.scores) if run.scores else "",
        general=general_line(run.scores["general"]) if run.scores and "general" in run.scores else None,
        has_forgotten=has_forgotten((run.scores or {}).get("general", {})),
        plots=list(plots(run.log)),
        replies=choose_replies(run),
        groups=GROUPS,
        notices=notices(run.ledger) if run.ledger else [],
        resources=resources(run),
        parity=parity_line(run.config["parity"]) if run.config.get("parity") else None,
        merge=merge_line(run.config["merge"]) if run.config.get("merge") else None,
        recipe=yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=1000),
    )
    write_bytes(output_dir / "loss.png", loss_png(run.log))
    write_text(output_dir / "report.html", page)
    write_cards(run)
    return output_dir / "report.html"


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Writes comparison.html. Returns: the page. Raises: UserError: it cannot be written."""
    logs = {letter: run.log for letter, run in zip(LETTERS, comparison.runs, strict=False)}
    page = _template("comparison.html").render(
        comparison=comparison,
        letters=LETTERS[: len(comparison.runs)],
        headline=comparison_headline(comparison),
        stories=list(map(story, comparison.runs)),
        plots=list(compared_plots(logs)),
        replies=by_spread(comparison.rows)[:SHOWN],
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "comparison.html", page)
    return folder / "comparison.html"


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "spelled_out": spelled_out,
        "message_text": message_text,
        "score": rounded,
        "direction": direction,
    }
    return environment.get_template(name)
