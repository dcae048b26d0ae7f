"""README.md of lora_adapter/ and of final_model/: their model cards, from the files of a run's output_dir alone.

sft/results/model_card.md is the text. Every value in it is escaped for Markdown, and no absolute path is in it.
"""

import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load
from markupsafe import Markup

from sft.data.conversation import strings
from sft.files import write_text
from sft.results.run_folder import Run
from sft.results.words import headline, merge_line, notices, parity_line, plain, score_table, scored_model, story

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")


def write_cards(run: Run) -> None:
    """Writes README.md into each of the two folders that is there. Raises: UserError: it cannot be written."""
    for kind, name in (("adapter", "lora_adapter"), ("model", "final_model")):
        if (run.folder / name).is_dir():
            write_text(run.folder / name / "README.md", _without_places(_card(run, kind, name), run))


def _card(run: Run, kind: str, folder: str) -> str:
    name, scores, ledger, recipe = run.folder.resolve().name, run.scores, run.ledger or {}, run.recipe
    base, export = str(recipe.get("model_name_or_path", "unknown")), recipe.get("export") or {}
    is_pushed = export.get("push_to_hub") and (kind == "model" or not export.get("merge"))
    rows = score_table(scores) if scores else []
    lora, chat, parity = recipe.get("lora_config") or {}, recipe.get("chat") or {}, run.config.get("parity") or {}
    stops = parity.get("trained_stops") or ledger.get("stop_tokens") or {}
    merge = run.config.get("merge")
    body = _template().render(
        name=name,
        kind=kind,
        story=story(run),
        headline=headline(scores, rows) if scores else None,
        base=base,
        folder=export["push_to_hub"] if is_pushed else (run.folder / folder).as_posix(),
        alias=re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "tuned",  # a name for servers
        max_rank=next((rank for rank in VLLM_RANKS if rank >= lora.get("r", 8)), VLLM_RANKS[-1]),
        unserved=[key for key in ("use_dora", "modules_to_save") if lora.get(key)]
        + ["peft_type"] * (lora.get("peft_type", "LORA") != "LORA"),
        own_template=any(chat.get(key) for key in ("template", "response_template", "variables")),
        stops=", ".join(f"{token} ({id})" for token, id in stops.items()),
        stop_ids=Markup(list(stops.values())),
        not_checked=parity.get("not_checked"),
        scores=rows,
        rows=f"{scores.get('rows', 0):,}" if scores else "",
        test_name=_test_name(run),
        scored=scored_model(scores) if scores else "",
        files=[_counted(file) for file in ledger.get("files") or []],
        notices=notices(ledger),
        checks=[line for line in (merge and merge_line(merge), parity and parity_line(parity)) if line],
        license=_license_of(base),
        versions=", ".join(f"{package} {version}" for package, version in (run.config.get("versions") or {}).items()),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=1000),
    )
    return f"---\n{_metadata(run, kind, name, base)}\n---\n\n" + re.sub(r"\n{3,}", "\n\n", body) + "\n"


def _metadata(run: Run, kind: str, name: str, base: str) -> str:
    """The YAML before the card, by which a hub lists the model; the licence is the user's to add."""
    results, recipe = list(_results(run)), run.recipe
    has_lora = recipe.get("lora_config") or recipe.get("adapter_name_or_path")
    languages = {"zh", "ja", "th"} & {(run.scores or {}).get("language")}
    return ModelCardData(
        base_model=base if HUB_ID.fullmatch(base) and not Path(base).is_dir() else None,
        language=sorted(map(str, languages)) or None,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["sft", "trl", "conversational", *(["lora"] if has_lora else [])],
        model_name=name if results else None,
        eval_results=results or None,
    ).to_yaml()


def _results(run: Run) -> Iterator[EvalResult]:
    scores = run.scores or {}
    for metric, entry in (scores.get("tuned") or {}).items():
        score, before = entry.get("score"), (scores.get("base") or {}).get(metric, {}).get("score")
        if score is None or not math.isfinite(score):
            continue
        found = {"rows": scores.get("rows"), "low": entry.get("low"), "high": entry.get("high"), "before": before}
        yield EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^A-Za-z0-9_.-]+", "-", _test_name(run)),  # a hub takes nothing else
            dataset_name=plain(_test_name(run)),
            dataset_split="test",
            metric_type=plain(metric),
            metric_value=score,
            metric_args={**{key: value for key, value in found.items() if value is not None}}
            | ({"signature": plain(entry["signature"])} if entry.get("signature") else {}),
        )


def _test_name(run: Run) -> str:
    """What was scored on: the names of the files, or which share of the training files."""
    files, share = (run.ledger or {}).get("files") or [], (run.recipe.get("dataset") or {}).get("test")
    split = "train" if isinstance(share, float) else "test"
    names = ", ".join(Path(file["path"]).name for file in files if file["split"] == split) or "the test split"
    return f"{share:.3g} of {names}" if isinstance(share, float) else names


def _license_of(base: str) -> str:
    """What the base's own card names, where it is on this machine."""
    folder = Path(base).expanduser()
    card: Any = None
    if folder.is_dir():
        card = folder / "README.md"
    elif HUB_ID.fullmatch(base):
        card = try_to_load_from_cache(base, "README.md")
    try:
        found = metadata_load(card) if isinstance(card, str | Path) and Path(card).is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        return "unknown (its card cannot be read)"
    return str((found or {}).get("license_name") or (found or {}).get("license") or "unknown")


# --------------------------------------------------------------------------------------------------------------- texts


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), finalize=markdown, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"shell": _shell, "literal": _literal, "fenced": _fenced, "cell": _cell, "row": _row}
    return environment.get_template("model_card.md")


def markdown(value: Any) -> str:
    r"""A value on one line that Markdown shows as it stands.

    >>> markdown("<b>*a*\n| [x](y)")
    '\\<b\\>\\*a\\* \\| \\[x\\](y)'
    """
    return value if isinstance(value, Markup) else MARKDOWN.sub(r"\\\1", " ".join(plain(value).split()))


def _shell(value: Any) -> Markup:
    return Markup(shlex.quote(" ".join(plain(value).split())))


def _literal(value: Any) -> Markup:
    return Markup(json.dumps(plain(value)))


def _fenced(text: str) -> Markup:
    """Text as a block of code, between more backticks than it holds in a row."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}yaml\n{plain(text).rstrip()}\n{fence}")


def _counted(file: dict[str, Any]) -> list[str]:
    """A line of the table of data."""
    counts = [f"{file[key]:,}" for key in ("rows", "used", "tokens")]
    return [file["split"], file["path"], *counts, f"{file['supervised_share']:.0%}"]


def _row(cells: list[str]) -> Markup:
    return Markup(f"| {' | '.join(map(markdown, cells))} |")


def _cell(side: tuple[str, str] | None) -> str:
    return "" if side is None else f"{side[0]} ({side[1]})" if side[1] else side[0]


def _without_places(card: str, run: Run) -> str:
    """The card with the last name of each absolute path of the recipe and the data in the path's place."""
    files = (run.ledger or {}).get("files") or []
    named = {str(run.folder), *strings(run.recipe), *(str(file["path"]) for file in files)}
    for path in sorted(named, key=len, reverse=True):
        if Path(path).is_absolute() or path.startswith("~"):
            for written in (path, markdown(path)):
                card = card.replace(written, Path(path).name)
    return card
