"""Words for people: what a run was, what it found and what it took, and texts made safe to print."""

import html
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from sft.plain_text import duration
from sft.results.run_folder import Run
from sft.results.scores import ScoreEntry, Scores

ALPHA = 0.05  # the p-value below which a change counts as clear
JOINERS = "\u200c\u200d"  # Persian words and emoji families need them


# --------------------------------------------------------------------------------------------------- texts and numbers


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


def message_text(message: dict[str, Any]) -> str:
    """The content of a message; tool calls and the like as JSON.

    >>> message_text({"role": "assistant", "content": "", "tool_calls": []})
    '\\n{"tool_calls": []}'
    """
    content = message.get("content")
    others = {key: value for key, value in message.items() if key not in ("role", "content")}
    parts = [content] if isinstance(content, str) else [] if content is None else [json.dumps(content)]
    return "\n".join(parts + ([json.dumps(others, ensure_ascii=False)] if others else []))


def number(value: float) -> str:
    """
    >>> number(0.8664), number(float("inf"))
    ('0.866', 'not a number')
    """
    return f"{value:.3g}" if math.isfinite(value) else "not a number"


# ------------------------------------------------------------------------------------------------------------ the run


def method(recipe: dict[str, Any]) -> str:
    """How the weights were changed, in a few words."""
    lora, quantised = recipe.get("lora_config"), recipe.get("quantization_config") or {}
    if lora is None and not recipe.get("adapter_name_or_path"):
        return "full fine-tuning"
    words = (lora or {}).get("peft_type", "LORA").replace("LORA", "LoRA")
    words = "DoRA" if lora and lora.get("use_dora") else words
    words += f" of rank {lora['r']}" if lora and "r" in lora else ""
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
        seen = (run.ledger or {}).get("seen")
        words += f", on {rows:,} conversations" + (f" ({seen:,} an epoch, by their weights)," if seen else ",")
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
        words += f", with version {commit[:12]} of the code{' and changes since' if changes else ''}"
    return words + "."


def _epochs(count: float) -> str:
    return f"{number(count)} epoch{'' if count == 1 else 's'}"


def since(resources: dict[str, Any]) -> str:
    """Where the time of a run's training begins, if it was stopped and went on: ", since checkpoint-4"."""
    return f", since {resources['since']}" if resources.get("since") else ""


def resources(run: Run) -> list[tuple[str, str]]:
    """Time and memory as (what, how much)."""
    measured, last = run.config.get("resources") or {}, run.log[-1] if run.log else {}
    names = {
        "load": "loading data and model",
        "train": f"training{since(measured)}",
        "export": "saving",
        "score": "scoring",
    }
    rows = [
        (names.get(part, part), duration(seconds))
        for part, seconds in (measured.get("seconds") or {}).items()
        if seconds is not None
    ]
    if "train_samples_per_second" in last:
        rows.append(("training rows a second", number(last["train_samples_per_second"])))
    for key, name in (("peak_memory_bytes", "peak memory"), ("peak_gpu_memory_bytes", "peak GPU memory")):
        if measured.get(key):
            rows.append((name, f"{measured[key] / 1e9:.1f} GB"))
    return rows


def parity_line(parity: dict[str, Any]) -> str:
    """What the comparison with a server found, in words.

    >>> parity_line({"prompts": 38, "spelled_control_tokens": 0, "trained_stops": {"</s>": 2}, "stops": {"</s>": 2}})
    'as served: plain transformers turns 38 prompts into the tokens of training, and answers end at </s> (2)'
    """
    if reason := parity.get("not_checked"):
        return f"as served: not checked; {reason}"
    words = f"as served: plain transformers turns {parity['prompts']:,} prompts into the tokens of training"
    if spelled := parity.get("spelled_control_tokens"):
        words += f" ({spelled:,} more spell a control token: text in training, the token for a server)"
    return f"{words}, and answers end at {', '.join(f'{token} ({id})' for token, id in parity['stops'].items())}"


def short_merge_line(certificate: dict[str, Any]) -> str:
    """The same in a line for the terminal."""
    if reason := certificate.get("not_checked"):
        return f"not compared with base and adapter; {reason}"
    if "merge_error" not in certificate:
        return f"not judged against base and adapter, since {certificate['not_judged']}"
    greedy, tokens = certificate["export"]["greedy"], certificate["positions"]
    return f"it writes as base and adapter do, {greedy:.1%} of {tokens:,} tokens the same ({certificate['dtype']})"


def merge_line(certificate: dict[str, Any]) -> str:
    """How far final_model/ is from base and adapter, in words.

    >>> near = {"logits": 3.5e-05, "kl": 1.7e-09, "greedy": 1.0}
    >>> exact = {"merge_error": 3.5e-05, "bound": 0.0014, "dtype": "float32", "float32": near, "export": near}
    >>> merge_line({"prompts": 8, "positions": 256, **exact})[:87]
    'merge: on 256 tokens of 8 prompts final_model/ is base and adapter to 3.5e-05 in logits'
    """
    if reason := certificate.get("not_checked"):
        return f"merge: not compared with base and adapter; {reason}"

    def told(name: str, difference: dict[str, float]) -> str:
        greedy = f"{difference['greedy']:.1%} of greedy tokens agree"
        return f"{name}: logits to {difference['logits']:.2g}, KL {difference['kl']:.2g}, {greedy}"

    dtype, parts = certificate["dtype"], []
    if "merge_error" in certificate:
        rounding = "" if dtype == "float32" else f" before they are rounded to {dtype}"
        error, bound = certificate["merge_error"], certificate["bound"]
        parts += [f"is base and adapter to {error:.2g} in logits{rounding} (allowed: {bound:.2g})"]
        parts += [told("in float32", certificate["float32"])]
    else:
        parts += [f"is not judged against base and adapter, since {certificate['not_judged']}"]
    if dtype != "float32":
        parts.append(told(f"in {dtype}", certificate["export"]))
    if "quantised" in certificate:
        parts.append(told("against the quantised base and adapter that were trained", certificate["quantised"]))
    where = f"{certificate['positions']:,} tokens of {certificate['prompts']:,} prompts"
    return f"merge: on {where} final_model/ {'; '.join(parts)}"


def notices(ledger: dict[str, Any]) -> list[str]:
    """What a person should know about the data, the gravest first."""

    def lines(numbers: Sequence[int]) -> str:
        return ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")

    def places(counted: dict[str, Any]) -> str:
        return ", ".join([place for place in counted.get("named", []) if place][:5])

    leaks, near, repeats = (ledger.get(name) or {} for name in ("test_in_train", "near_duplicates", "duplicates"))
    found = []
    if leaks.get("rows"):
        warning = "Warning: rows of the test split that are in the training split too, so that the scores flatter: "
        found.append(f"{warning}{leaks['rows']:,} ({places(leaks)})")
    if near.get("rows"):
        other = "other rows" if leaks.get("rows") else "rows"
        warning = f"Warning: {other} of the test split that nearly repeat a training row, so that the scores flatter: "
        found.append(f"{warning}{near['rows']:,} ({places(near)})")
    if repeats.get("rows"):
        found.append(f"Training rows that repeat an earlier one: {repeats['rows']:,} ({places(repeats)})")
    for file in ledger.get("files", []):
        for kind, dropped in (file.get("dropped") or {}).items():
            found.append(f"{file['path']}: {len(dropped):,} dropped for {kind}, at line {lines(dropped)}")
        if trimmed := file.get("trimmed"):
            found.append(f"{file['path']}: {len(trimmed):,} trimmed to dataset.max_length, at line {lines(trimmed)}")
        found += [f"{file['path']}: {count:,} {note}" for note, count in (file.get("notes") or {}).items()]
        if "examples" in file:
            found.append(f"{file['path']}: {file['used']:,} rows give {file['examples']:,} examples (chat.examples)")
    return found


# ---------------------------------------------------------------------------------------------------------- the scores


def scored_model(scores: Scores) -> str:
    """What the scores after training are of, in words; nothing where scores.json does not say.

    >>> scored_model({"model": "final"})
    'after: final_model/, as shipped'
    """
    names = {"adapter": "the adapter on its base, as trained", "final": "final_model/, as shipped"}
    return f"after: {names[scores['model']]}" if "model" in scores else ""


class ScoreRow(NamedTuple):
    """A line of the score table, ready to print. before, after: (score, interval)."""

    name: str
    direction: str
    before: tuple[str, str] | None
    after: tuple[str, str] | None
    outcome: str  # better | worse | "", which decides the colour
    verdict: str
    signature: str


def score_table(scores: Scores) -> list[ScoreRow]:
    base, tuned = scores.get("base") or {}, scores.get("tuned") or {}
    return [_score_row(name, scores, base.get(name), tuned.get(name)) for name in {**base, **tuned}]


def direction(higher_is_better: bool | None) -> str:
    """
    >>> direction(True)
    'higher is better'
    """
    if higher_is_better is None:
        return "neither is better"
    return "higher is better" if higher_is_better else "lower is better"


def rounded(entry: ScoreEntry | None, beside: Sequence[ScoreEntry]) -> tuple[str, str] | None:
    """(score, interval) with as many digits as the scores beside it; None: there is no score."""
    score = _score(entry)
    if entry is None or score is None:
        return None
    digits = 1 if max(abs(_score(each) or 0) for each in beside) >= 10 else 2
    low, high = entry.get("low"), entry.get("high")
    interval = "" if low is None or high is None else f"{low:,.{digits}f}–{high:,.{digits}f}"
    return f"{score:,.{digits}f}", interval


def _score_row(name: str, scores: Scores, before: ScoreEntry | None, after: ScoreEntry | None) -> ScoreRow:
    entries = [entry for entry in (before, after) if entry]
    higher = (scores.get("higher_is_better") or {}).get(name)
    outcome, verdict = _verdict(name, scores, before, after)
    signatures = [entry["signature"] for entry in entries if _score(entry) is not None and entry.get("signature")]
    sides = rounded(before, entries), rounded(after, entries)
    return ScoreRow(name, direction(higher), *sides, outcome, verdict, next(iter(signatures), ""))


def _score(entry: ScoreEntry | None) -> float | None:
    return entry.get("score") if entry else None


def _verdict(name: str, scores: Scores, before: ScoreEntry | None, after: ScoreEntry | None) -> tuple[str, str]:
    """(better, worse or "", the verdict in plain words)."""
    scoreless = [entry for entry in (before, after) if entry and entry.get("score") is None]
    if scoreless:
        return "", f"cannot be computed: {scoreless[-1].get('reason', 'no reason was given')}"
    base_score, tuned_score = _score(before), _score(after)
    if base_score is None or tuned_score is None:
        return "", "only one model was scored"
    p, higher = (scores.get("p_value") or {}).get(name), (scores.get("higher_is_better") or {}).get(name)
    if p is None or higher is None:
        return "", f"no verdict: {(scores.get('no_p_value') or {}).get(name, 'there is no p-value')}"
    return judged(p, (tuned_score > base_score) == higher, "change")


def judged(p: float, is_better: bool, what: str) -> tuple[str, str]:
    """(better, worse or "", the verdict in plain words) of a change, or another difference, with its p-value.

    >>> judged(0.004, False, "change"), judged(0.4, True, "difference")
    (('worse', 'worse, p = 0.004'), ('', 'no clear difference, p = 0.4'))
    """
    if p >= ALPHA:
        return "", f"no clear {what}, p = {p:.2g}"
    outcome = "better" if is_better else "worse"
    return outcome, f"{outcome}, p = {p:.2g}"


def headline(scores: Scores, rows: list[ScoreRow]) -> str:
    """The verdicts in a sentence."""

    def names(outcome: str) -> str:
        return ", ".join(row.name for row in rows if row.outcome == outcome)

    if not (scores.get("base") and scores.get("tuned")):
        return f"Only one model was scored, on {scores.get('rows', 0):,} answers."
    parts = [f"{outcome} by {names(outcome)}" for outcome in ("better", "worse") if names(outcome)]
    verdict = "no score shows a clear change"
    if parts:
        verdict = f"the trained model is {' and '.join(parts)} (p < {ALPHA})"
    return f"On {scores.get('rows', 0):,} test answers {verdict}."
