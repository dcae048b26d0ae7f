"""report.html, loss.png and a summary for the terminal, from the files of a run's output_dir alone.

sft/results/page.html is the page. Jinja escapes every value in it, and `plain` takes out what no page or terminal
should be given. The page has no script and asks for no other file.
"""

import html
import io
import json
import math
import random
import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import yaml
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from sft.errors import UserError
from sft.files import write_bytes, write_text
from sft.results.scores import row_scores

ALPHA = 0.05
REPLIES = {"best": 7, "worst": 7, "random": 6}
GROUPS = {"best": "improved most", "worst": "improved least", "random": "at random"}
SEED = 0
COLUMNS = 80  # of the terminal
JOINERS = "\u200c\u200d"  # Persian words and emoji families need them


# ------------------------------------------------------------------------------------------------------------ reading


@dataclass
class Run:
    """What output_dir holds; a file that is not there is None."""

    folder: Path
    config: dict[str, Any]
    ledger: dict[str, Any] | None
    state: dict[str, Any] | None
    scores: dict[str, Any] | None
    predictions: list[dict[str, Any]] | None

    @property
    def recipe(self) -> dict[str, Any]:
        return self.config.get("recipe") or {}

    @property
    def log(self) -> list[dict[str, Any]]:
        return (self.state or {}).get("log_history") or []


def read_run(folder: Path) -> Run:
    """Raises: UserError: there is no training_config.json, or a file is not JSON."""

    def read(name: str) -> Any:
        path, lines = folder / name, name.endswith(".jsonl")
        try:
            # Not splitlines: JSON text may hold other line ends, such as U+2028.
            text = path.read_bytes().decode("utf-8")
            return [json.loads(line) for line in text.split("\n") if line.strip()] if lines else json.loads(text)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{path} is not {'JSON lines' if lines else 'JSON'}: {error}") from None

    config = read("training_config.json")
    if config is None:
        raise UserError(f"there is no {folder / 'training_config.json'}; a report needs the folder of a run")
    names = ("data_ledger.json", "trainer_state.json", "scores.json", "predictions.jsonl")
    return Run(folder, config, *map(read, names))


# --------------------------------------------------------------------------------------------------------------- text


def plain(value: Any) -> str:
    """Text without control characters (shown as pictures: NUL is ␀, escape is ␛) and without halves of surrogates.

    >>> plain("a\\x00\\x1b[31m")
    'a␀␛[31m'
    """
    if isinstance(value, Markup):
        return value
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", lambda found: chr(0x2400 + ord(found[0])), str(value))
    return re.sub(r"[\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", text)


def spelled_out(text: str) -> Markup:
    """HTML of a text with its white space and invisible characters made visible."""
    return Markup("").join(map(_glyph, plain(text)))


def _glyph(character: str) -> Markup:
    known = {" ": "<i>·</i><wbr>", "\n": "<i>↵</i>\n", "\t": "<i>⇥</i><wbr>", "\r": "<i>␍</i>"}
    if character in known:
        return Markup(known[character])
    if unicodedata.category(character) in ("Cf", "Zs", "Zl", "Zp") and character not in JOINERS:
        return Markup(f"<i>U+{ord(character):04X}</i><wbr>")
    return Markup(html.escape(character))


def said(message: dict[str, Any]) -> str:
    """What a message says; tool calls and the like as JSON."""
    content = message.get("content")
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    parts = [content] if isinstance(content, str) else [] if content is None else [json.dumps(content)]
    return "\n".join(parts + ([json.dumps(rest, ensure_ascii=False)] if rest else []))


def duration(seconds: float) -> str:
    """
    >>> duration(0.42), duration(130), duration(7322)
    ('0.4 s', '2 min 10 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not a number"


# --------------------------------------------------------------------------------------------------------- what it was


def method(recipe: dict[str, Any]) -> str:
    """How the weights were changed, in a few words."""
    lora, quantised = recipe.get("lora_config"), recipe.get("quantization_config") or {}
    if lora is None and not recipe.get("adapter_name_or_path"):
        return "full fine-tuning"
    words = "LoRA" + (f" of rank {lora['r']}" if lora and "r" in lora else "")
    if recipe.get("adapter_name_or_path"):
        words += f", going on from {recipe['adapter_name_or_path']},"
    if quantised.get("load_in_4bit"):
        words += f" over 4-bit weights ({quantised.get('bnb_4bit_quant_type', 'fp4')})"
    elif quantised.get("load_in_8bit"):
        words += " over 8-bit weights"
    return words


def story(run: Run) -> str:
    """One sentence: model, method, rows, epochs, device, commit."""
    args, recipe = run.recipe.get("training_args") or {}, run.recipe
    words = f"{recipe.get('model_name_or_path', 'A model')} was trained by {method(recipe)}"
    rows = ((run.ledger or {}).get("rows") or {}).get("train")
    if rows is not None:
        words += f", on {rows:,} conversations,"
    if run.state:
        words += f" for {_epochs(run.state.get('epoch') or 0)} ({run.state.get('global_step', 0):,} steps)"
    elif args.get("max_steps", -1) > 0:
        words += f" for {args['max_steps']:,} steps"
    elif "num_train_epochs" in args:
        words += f" for {_epochs(args['num_train_epochs'])}"
    if "learning_rate" in args:
        words += f" at a learning rate of {args['learning_rate']:g}"
    if run.config.get("device"):
        words += f", on {'a CPU' if run.config['device'] == 'cpu' else run.config['device']}"
    if run.config.get("commit"):
        commit, changes, _ = str(run.config["commit"]).partition("+")
        words += f", at commit {commit[:12]}{' with uncommitted changes' if changes else ''}"
    return words + "."


def _epochs(count: float) -> str:
    return f"{number(count)} epoch{'' if count == 1 else 's'}"


def spent(run: Run) -> list[tuple[str, str]]:
    """Time and memory as (what, how much)."""
    resources, last = run.config.get("resources") or {}, run.log[-1] if run.log else {}
    names = {"load": "loading data and model", "train": "training", "export": "saving", "score": "scoring"}
    rows = [
        (names.get(part, part), duration(taken))
        for part, taken in (resources.get("seconds") or {}).items()
        if taken is not None
    ]
    if "train_samples_per_second" in last:
        rows.append(("training rows a second", number(last["train_samples_per_second"])))
    for key, name in (("peak_memory_bytes", "peak memory"), ("peak_gpu_memory_bytes", "peak GPU memory")):
        if resources.get(key):
            rows.append((name, f"{resources[key] / 1e9:.1f} GB"))
    return rows


def notices(ledger: dict[str, Any]) -> list[str]:
    """What a person should know about the data, the gravest first."""

    def lines(numbers: Sequence[int]) -> str:
        return ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")

    def named(found: dict[str, Any]) -> str:
        return ", ".join([place for place in found.get("named", []) if place][:5])

    leaks, repeats = ledger.get("test_in_train") or {}, ledger.get("duplicates") or {}
    found = []
    if leaks.get("rows"):
        told = "Warning: rows of the test split that are in the training split too, so that the scores flatter: "
        found.append(f"{told}{leaks['rows']:,} ({named(leaks)})")
    if repeats.get("rows"):
        found.append(f"Training rows that repeat an earlier one: {repeats['rows']:,} ({named(repeats)})")
    for file in ledger.get("files", []):
        for kind, at in (file.get("dropped") or {}).items():
            found.append(f"{file['path']}: {len(at):,} dropped for {kind}, at line {lines(at)}")
        if at := file.get("trimmed"):
            found.append(f"{file['path']}: {len(at):,} trimmed to dataset.max_length, at line {lines(at)}")
        found += [f"{file['path']}: {count:,} {note}" for note, count in (file.get("notes") or {}).items()]
    return found


# ------------------------------------------------------------------------------------------------------------- scores


class ScoreRow(NamedTuple):
    """A line of the score table, ready to print. before, after: (score, interval)."""

    name: str
    direction: str
    before: tuple[str, str] | None
    after: tuple[str, str] | None
    outcome: str  # better | worse | "", which decides the colour
    verdict: str
    signature: str


def score_rows(scores: dict[str, Any]) -> list[ScoreRow]:
    models = [scores.get(model) or {} for model in ("base", "tuned")]
    return [_score_row(name, scores, models) for name in dict.fromkeys([*models[0], *models[1]])]


def _score_row(name: str, scores: dict[str, Any], models: list[dict[str, Any]]) -> ScoreRow:
    entries = [model.get(name) for model in models]
    known = [entry for entry in entries if entry and entry.get("score") is not None]
    digits = 1 if max((abs(entry["score"]) for entry in known), default=0) >= 10 else 2

    def shown(entry: dict[str, Any] | None) -> tuple[str, str] | None:
        if entry is None or entry.get("score") is None:
            return None
        low, high = entry.get("low"), entry.get("high")
        interval = "" if low is None or high is None else f"{low:,.{digits}f}–{high:,.{digits}f}"
        return f"{entry['score']:,.{digits}f}", interval

    higher: bool | None = (scores.get("higher_is_better") or {}).get(name)
    direction = "neither is better" if higher is None else "higher is better" if higher else "lower is better"
    outcome, verdict = _verdict(name, scores, entries, higher)
    signature = next((entry["signature"] for entry in known if entry.get("signature")), "")
    return ScoreRow(name, direction, shown(entries[0]), shown(entries[1]), outcome, verdict, signature)


def _verdict(name: str, scores: dict[str, Any], entries: list[Any], higher: bool | None) -> tuple[str, str]:
    """(better, worse or "", the verdict in plain words)."""
    reasons = [entry.get("reason", "no reason was given") for entry in entries if entry and entry.get("score") is None]
    if reasons:
        return "", f"cannot be computed: {reasons[-1]}"
    if None in entries:
        return "", "only one model was scored"
    p = (scores.get("p_value") or {}).get(name)
    if p is None or higher is None:
        return "", f"no verdict: {(scores.get('no_p_value') or {}).get(name, 'there is no p-value')}"
    if p >= ALPHA:
        return "", f"no clear change, p = {p:.2g}"
    outcome = "better" if (entries[1]["score"] > entries[0]["score"]) == higher else "worse"
    return outcome, f"{outcome}, p = {p:.2g}"


def headline(scores: dict[str, Any], rows: list[ScoreRow]) -> str:
    """The verdicts in a sentence."""

    def names(outcome: str) -> str:
        return ", ".join(row.name for row in rows if row.outcome == outcome)

    if not (scores.get("base") and scores.get("tuned")):
        return f"Only one model was scored, on {scores.get('rows', 0):,} answers."
    parts = [f"{outcome} by {names(outcome)}" for outcome in ("better", "worse") if names(outcome)]
    told = "no score shows a clear change"
    if parts:
        told = f"the trained model is {' and '.join(parts)} (p < {ALPHA})"
    return f"On {scores.get('rows', 0):,} test answers {told}."


# ------------------------------------------------------------------------------------------------------------ replies


class Reply(NamedTuple):
    """One line of predictions.jsonl, and why it is shown. before, after: chrF of this answer, or None."""

    group: str
    row: dict[str, Any]
    before: float | None
    after: float | None


def choose_replies(run: Run) -> list[Reply]:
    """Twenty answers: those whose chrF rose most, fell most, and random others; without a comparison, random ones."""
    predictions = run.predictions or []
    before, after = _chrf(run, "base"), _chrf(run, "tuned")
    change = after - before
    order = [int(i) for i in np.argsort(-change, kind="stable") if np.isfinite(change[i])]
    best = order[: REPLIES["best"]]
    worst = [i for i in reversed(order) if i not in best][: REPLIES["worst"]]
    rest = [i for i in range(len(predictions)) if i not in best and i not in worst]
    wanted = min(len(rest), sum(REPLIES.values()) - len(best) - len(worst))
    others = sorted(random.Random(SEED).sample(rest, wanted))

    def known(score: float) -> float | None:
        return float(score) if np.isfinite(score) else None

    groups = {"best": best, "worst": worst, "random": others}
    return [
        Reply(group, predictions[i], known(before[i]), known(after[i])) for group, rows in groups.items() for i in rows
    ]


def _chrf(run: Run, model: str) -> np.ndarray:
    """chrF of each answer of a model, (rows,); not a number where there is none."""
    predictions = run.predictions or []
    scores = np.full(len(predictions), np.nan)
    rows = [i for i, row in enumerate(predictions) if isinstance(row.get(model), str) and row.get("reference")]
    if rows:
        answers = {"predictions": [plain(predictions[i][model]) for i in rows]}
        found = row_scores("chrf", [plain(predictions[i]["reference"]) for i in rows], answers)
        scores[rows] = found.get("chrf", np.nan)
    return scores


# -------------------------------------------------------------------------------------------------------------- plots


class Curve(NamedTuple):
    """What was logged under one key. steps, values: (points,); values that are no numbers are NaN."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        return self.values[np.isfinite(self.values)]

    def told(self, name: str) -> str:
        """The curve in words, for whoever does not see it."""
        broken = [f"{step:g}" for step, value in zip(*self, strict=True) if not math.isfinite(value)]
        words = f"{name}: nothing was logged"
        if len(self.finite):
            first, last = self.finite[[0, -1]]
            words = f"{name}: {number(first)}"
        if len(self.finite) > 1:
            words = f"{name}: from {number(first)} to {number(last)}"
            ends = {"lowest": self.finite.min(), "highest": self.finite.max()}
            words += "".join(f", {end} {number(value)}" for end, value in ends.items() if value not in (first, last))
        if broken:
            words += f"; not a number at {len(broken)} of {len(self.values)} logged steps: {', '.join(broken[:5])}"
            words += ", …" if len(broken) > 5 else ""
        return words


def curve(log: list[dict[str, Any]], key: str) -> Curve:
    points = [(float(entry.get("step", 0)), float(entry[key])) for entry in log if entry.get(key) is not None]
    steps, values = np.array(points, float).reshape(-1, 2).T
    return Curve(steps, np.where(np.isfinite(values), values, np.nan))


class Colours(NamedTuple):
    ink: str
    first: str
    second: str


PAPER = Colours("#1f2328", "#1f5fd0", "#b35900")
# Stand-ins for what only the page knows: its text colour and, light or dark, its two line colours.
PAGE = Colours("#010203", "#010204", "#010205")
CSS = Colours("currentColor", "var(--after)", "var(--before)")


def draw(curves: dict[str, Curve], title: str, size: tuple[float, float], colours: Colours) -> Figure:
    """One plot over the steps: the first curve solid, a second dashed; of many noisy points the running mean too.

    Args: size: inches.
    """
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=colours.ink)
    axes.set_xlabel("step", color=colours.ink)
    axes.tick_params(colors=colours.ink)
    axes.grid(color=colours.ink, alpha=0.15, linewidth=0.6)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    axes.yaxis.get_offset_text().set_color(colours.ink)
    for side, spine in axes.spines.items():
        spine.set(color=colours.ink, alpha=0.5, visible=side in ("left", "bottom"))
    styles: list[dict[str, Any]] = [
        {"color": colours.first},
        {"color": colours.second, "linestyle": "--", "marker": "o"},
    ]
    drawn = 0
    for (name, (steps, values)), style in zip(curves.items(), styles, strict=False):
        if not np.isfinite(values).any():
            continue
        if len(values) > 60 and name != "learning rate" and not np.isnan(values).any():
            axes.plot(steps, values, color=style["color"], alpha=0.35, linewidth=0.8)
            values, name = _running_mean(values, len(values) // 20), f"{name}, running mean"
        marker = {"marker": "o"} if len(values) < (60 if np.isnan(values).any() else 12) else {}
        axes.plot(steps, values, **{"linewidth": 1.8, "markersize": 4, "label": name, **marker, **style})
        drawn += 1
    if not drawn:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing was logged", transform=axes.transAxes, ha="center", va="center", color=colours.ink)
    if len(curves) > 1 and drawn:
        axes.legend(frameon=False, labelcolor=colours.ink)
    return figure


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Over `width` points on both sides, fewer at the ends."""
    window = np.ones(2 * width + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def svg(figure: Figure, name: str) -> Markup:
    """A figure as an <svg> for the page: its colours, no ids that two plots share, nothing about who made it."""
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    drawn = text.getvalue()
    drawn = re.sub(
        r"<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", drawn[drawn.index("<svg") :], flags=re.DOTALL
    )
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)
    drawn = re.sub(r"font: (?:(\w+) )?([\d.]+px) [^;\"]*", r"font: \1 \2 system-ui, sans-serif", drawn)
    for stand_in, colour in zip(PAGE, CSS, strict=True):
        drawn = drawn.replace(stand_in, colour)
    return Markup(drawn)


# ----------------------------------------------------------------------------------------------------------- the page


PAGE_PLOTS = {  # title: {name: key of log_history}
    "Loss": {"training": "loss", "validation": "eval_loss"},
    "Learning rate": {"learning rate": "learning_rate"},
    "Gradient norm": {"gradient norm": "grad_norm"},
}


def plots(log: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The page's plots: title, told (what they show, in words) and svg."""
    for title, keys in PAGE_PLOTS.items():
        curves = {name: curve(log, key) for name, key in keys.items()}
        told = [found.told(name).capitalize() + "." for name, found in curves.items() if len(found.values)]
        yield {
            "title": title,
            "told": " ".join(told) or "Nothing was logged.",
            "svg": svg(draw(curves, title, (4.2, 2.9), PAGE), title),
        }


def write_report(output_dir: Path) -> Path:
    """Writes report.html and loss.png into output_dir. Returns: the page.

    Raises: UserError: output_dir is no folder of a run, or cannot be written.
    """
    run = read_run(output_dir)
    rows = score_rows(run.scores) if run.scores else []
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions: dict[str, Callable] = {"spelled_out": spelled_out, "said": said}
    pages.filters.update(functions)
    page = pages.get_template("page.html").render(
        run=run,
        name=output_dir.resolve().name,
        story=story(run),
        headline=headline(run.scores, rows) if run.scores else None,
        score_rows=rows,
        plots=list(plots(run.log)),
        replies=choose_replies(run),
        groups=GROUPS,
        notices=notices(run.ledger) if run.ledger else [],
        spent=spent(run),
        recipe=yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=1000),
    )
    losses = {name: curve(run.log, key) for name, key in PAGE_PLOTS["Loss"].items()}
    paper = io.BytesIO()
    draw(losses, "Loss", (8, 4.5), PAPER).savefig(paper, format="png", dpi=150, facecolor="white")
    write_bytes(output_dir / "loss.png", paper.getvalue())
    write_text(output_dir / "report.html", page)
    return output_dir / "report.html"


# -------------------------------------------------------------------------------------------------------- the summary


def summary(output_dir: Path) -> str:
    """The run in a screenful of at most 80 columns. Raises: UserError: output_dir is no folder of a run."""
    run = read_run(output_dir)
    parts = [textwrap.fill(_fit(story(run), 8 * COLUMNS).rstrip(), COLUMNS), "\n".join(_loss_lines(run.log))]
    if run.scores:
        parts.append("\n".join(_score_lines(run.scores)))
    parts += ["\n".join(_reply_lines(reply)) for reply in _told_replies(choose_replies(run))]
    shown = ("report.html", "loss.png", "lora_adapter", "final_model", "scores.json", "predictions.jsonl")
    there = [name + "/" * (output_dir / name).is_dir() for name in shown if (output_dir / name).exists()]
    files = textwrap.fill("  ".join(there), COLUMNS, initial_indent="  ", subsequent_indent="  ")
    parts.append(f"in {plain(output_dir)}:\n{files}")
    return "\n\n".join(part for part in parts if part)


def _loss_lines(log: list[dict[str, Any]]) -> Iterator[str]:
    found = {name: curve(log, key) for name, key in PAGE_PLOTS["Loss"].items()}
    if not any(len(each.values) for each in found.values()):
        return
    yield f"{'loss':<16}{'first':>12}{'last':>12}"
    for name, (_, values) in found.items():
        if len(values):
            yield f"  {name:<14}{number(values[0]):>12}{number(values[-1]):>12}"


def _score_lines(scores: dict[str, Any]) -> Iterator[str]:
    rows = f"{scores.get('rows', 0):,} answers"
    yield f"{'score':<16}{'before':>12}{'after':>12}  {rows}"
    for row in score_rows(scores):
        before, after = (shown[0] if shown else "-" for shown in (row.before, row.after))
        line = f"  {_fit(row.name, 14)}{before:>12}{after:>12}  {_fit(row.verdict, 2 * COLUMNS).rstrip()}"
        yield textwrap.fill(line, COLUMNS, subsequent_indent=" " * 42)


def _told_replies(replies: list[Reply]) -> list[Reply]:
    """The first of each group."""
    return list({reply.group: reply for reply in reversed(replies)}.values())[::-1]


def _reply_lines(reply: Reply) -> Iterator[str]:
    asked = said(reply.row["messages"][-1]) if reply.row.get("messages") else ""
    texts = {"asked": asked, "wanted": reply.row.get("reference"), "before": reply.row.get("base")}
    yield _fit(f"{GROUPS[reply.group]}, {reply.row.get('row')}", COLUMNS).rstrip()
    for name, text in (texts | {"after": reply.row.get("tuned")}).items():
        if text is not None:
            yield f"  {name:<8}{_fit(text, COLUMNS - 10)}".rstrip()


def _fit(text: str, columns: int) -> str:
    """A text on one line, cut or padded to so many columns of a terminal, in which a Chinese letter takes two."""
    text = " ".join("".join(c for c in plain(text) if unicodedata.category(c) != "Cf" or c in JOINERS).split())

    def width(character: str) -> int:
        if unicodedata.combining(character) or character in JOINERS:
            return 0
        return 2 if unicodedata.east_asian_width(character) in "WF" else 1

    total = sum(map(width, text))
    if total > columns:
        kept, total = "", 1
        for character in text:
            if total + width(character) > columns:
                break
            kept, total = kept + character, total + width(character)
        text = kept + "…"
    return text + " " * (columns - total)
