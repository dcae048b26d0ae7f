"""report.html and loss.png, from the files of a run's output_dir alone.

sft/results/page.html is the page. Jinja escapes every value in it, and `plain` takes out what no page or terminal
should be given. The page has no script and asks for no other file.
"""

from pathlib import Path

import jinja2
import yaml

from sft.files import write_bytes, write_text
from sft.results.advice import advice
from sft.results.curves import loss_png, plots
from sft.results.forgetting import general_line, has_forgotten
from sft.results.replies import GROUPS, choose_replies
from sft.results.run_folder import read_run
from sft.results.words import (
    headline,
    merge_line,
    message_text,
    notices,
    parity_line,
    plain,
    resources,
    score_table,
    scored_model,
    spelled_out,
    story,
)


def write_report(output_dir: Path) -> Path:
    """Writes report.html and loss.png into output_dir. Returns: the page.

    Raises: UserError: output_dir is no folder of a run, or cannot be written.
    """
    run = read_run(output_dir)
    rows = score_table(run.scores) if run.scores else []
    page = _template().render(
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
    return output_dir / "report.html"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"spelled_out": spelled_out, "message_text": message_text}
    return environment.get_template("page.html")
