"""Curves of what was logged while training: as words, as plots of the page, and as loss.png."""

import io
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup

from sft.results.words import number

if TYPE_CHECKING:  # half a second, which --check and a run's first step need not wait for
    from matplotlib.figure import Figure

PLOTS = {  # title: {name: key of log_history}
    "Loss": {"training": "loss", "validation": "eval_loss"},
    "Learning rate": {"learning rate": "learning_rate"},
    "Gradient norm": {"gradient norm": "grad_norm"},
}
# What transformers and trl log of a validation; all else is a score of answers (evaluation.every).
OF_VALIDATION = re.compile(
    r"eval_(loss|runtime|\w+_per_second|model_preparation_time|entropy|num_tokens|mean_token_accuracy|aux_loss)"
)


class Curve(NamedTuple):
    """What was logged under one key. steps, values: (points,); values that are no numbers are NaN."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        return self.values[np.isfinite(self.values)]

    def caption(self, name: str) -> str:
        """The curve in words, for whoever does not see it."""
        words = f"{name}: nothing was logged"
        if len(self.finite):
            first, last = self.finite[[0, -1]]
            words = f"{name}: {number(first)}"
        if len(self.finite) > 1:
            words = f"{name}: from {number(first)} to {number(last)}"
            ends = {"lowest": self.finite.min(), "highest": self.finite.max()}
            words += "".join(f", {end} {number(value)}" for end, value in ends.items() if value not in (first, last))
        not_finite = [f"{step:g}" for step, value in zip(*self, strict=True) if not math.isfinite(value)]
        if not_finite:
            words += f"; not a number at {len(not_finite)} of {len(self.values)} logged steps: "
            words += ", ".join(not_finite[:5]) + (", …" if len(not_finite) > 5 else "")
        return words


def curve(log: list[dict[str, Any]], key: str) -> Curve:
    points = [(float(entry.get("step", 0)), float(entry[key])) for entry in log if entry.get(key) is not None]
    steps, values = np.array(points, float).reshape(-1, 2).T
    return Curve(steps, np.where(np.isfinite(values), values, np.nan))


def curves_of(log: list[dict[str, Any]], title: str) -> dict[str, Curve]:
    """The curves of one plot. title: a key of PLOTS."""
    return {name: curve(log, key) for name, key in PLOTS[title].items()}


def score_curves(log: list[dict[str, Any]]) -> dict[str, Curve]:
    """The scores of answers to the validation split while training, by name."""
    keys = dict.fromkeys(key for entry in log for key in entry if key.startswith("eval_"))
    return {key.removeprefix("eval_"): curve(log, key) for key in keys if not OF_VALIDATION.fullmatch(key)}


# -------------------------------------------------------------------------------------------------------- the drawing


class Colours(NamedTuple):
    ink: str
    lines: tuple[str, ...]


PAPER = Colours("#1f2328", ("#1f5fd0", "#b35900"))
# Stand-ins for what only the page knows: its text colour and, light or dark, its line colours.
PAGE = Colours("#010203", ("#010204", "#010205", "#010206", "#010207", "#010208", "#010209"))
CSS = Colours("currentColor", ("var(--after)", "var(--before)"))
RUNS_CSS = Colours("currentColor", tuple(f"var(--run-{letter})" for letter in "abcdef"))
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))


def draw(curves: dict[str, Curve], title: str, size: tuple[float, float], colours: Colours) -> "Figure":
    """One plot over the steps: the first curve solid, others dashed; of many noisy points the running mean too.

    Args: size: inches.
    """
    from matplotlib.figure import Figure

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
    drawn = 0
    for (name, (steps, values)), colour, dash in zip(curves.items(), colours.lines, DASHES, strict=False):
        if not np.isfinite(values).any():
            continue
        style: dict[str, Any] = {"color": colour, "linestyle": dash, "marker": "o" if name == "validation" else ""}
        if len(values) > 60 and title != "Learning rate" and not np.isnan(values).any():
            axes.plot(steps, values, color=colour, alpha=0.35, linewidth=0.8)
            values, name = _running_mean(values, len(values) // 20), f"{name}, running mean"
        if len(values) < (60 if np.isnan(values).any() else 12):
            style["marker"] = "o"
        axes.plot(steps, values, linewidth=1.8, markersize=4, label=name, **style)
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


def svg(figure: "Figure", name: str, css: Colours = CSS) -> Markup:
    """A figure as an <svg> for the page: its colours, no ids that two plots share, nothing about who made it."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    markup = file.getvalue()
    markup = re.sub(
        r"<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", markup[markup.index("<svg") :], flags=re.DOTALL
    )
    markup = re.sub(r'<g id="[^"]*"', "<g", markup)
    markup = re.sub(r"font: (?:(\w+) )?([\d.]+px) [^;\"]*", r"font: \1 \2 system-ui, sans-serif", markup)
    for stand_in, colour in zip((PAGE.ink, *PAGE.lines), (css.ink, *css.lines), strict=False):
        markup = markup.replace(stand_in, colour)
    return Markup(markup)


# ---------------------------------------------------------------------------------------------------------- the plots


class Plot(NamedTuple):
    """A plot of the page. caption: what it shows, in words."""

    title: str
    caption: str
    svg: Markup


def plots(log: list[dict[str, Any]]) -> Iterator[Plot]:
    """The plots of the page."""
    of_scores = {f"{name}, answers to validation rows": {name: found} for name, found in score_curves(log).items()}
    for title, curves in ({title: curves_of(log, title) for title in PLOTS} | of_scores).items():
        captions = [each.caption(name).capitalize() + "." for name, each in curves.items() if len(each.values)]
        figure = draw(curves, title, (4.2, 2.9), PAGE)
        yield Plot(title, " ".join(captions) or "Nothing was logged.", svg(figure, title))


def compared_plots(logs: dict[str, list[dict[str, Any]]]) -> Iterator[Plot]:
    """The curves of several runs over each other. logs: by the name of the run."""
    for title, key in {
        "Training loss": "loss",
        "Validation loss": "eval_loss",
        "Learning rate": "learning_rate",
    }.items():
        curves = {name: curve(log, key) for name, log in logs.items()}
        caption = ". ".join(each.caption(name) for name, each in curves.items() if len(each.values))
        yield Plot(
            title, f"{caption or 'Nothing was logged'}.", svg(draw(curves, title, (4.2, 2.9), PAGE), title, RUNS_CSS)
        )


def loss_png(log: list[dict[str, Any]]) -> bytes:
    """The losses as a picture on white paper."""
    file = io.BytesIO()
    draw(curves_of(log, "Loss"), "Loss", (8, 4.5), PAPER).savefig(file, format="png", dpi=150, facecolor="white")
    return file.getvalue()
