"""Folders of runs, whole, broken or hostile, and a page as a browser takes it."""

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

from sft.results.scores import score_answers

DEMO = Path(__file__).resolve().parents[2] / "data" / "demo"
HOSTILE = (
    "<script>document.title='ran'</script>",
    "</style></pre></svg><img src=x onerror=\"document.title='ran'\">",
    '" onload="document.title=\'ran\'" x="',
    "<!-- {{ 7 * 7 }} {% raw %} ]]> &lt;b&gt;",
    "W" * 3000,
    "\u202eاللغة العربية\u202c עברית",
    "👩\u200d👩\u200d👧 🇩🇪 e\u0301",
    "nul \0 escape \x1b[31m half \ud800 \u2028 end",
)


def config(**changes):
    recipe = {
        "model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "output_dir": "output/demo",
        "lora_config": {"r": 16, "target_modules": "all-linear"},
        "quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "training_args": {"learning_rate": 2e-4, "num_train_epochs": 3},
        "dataset": {"train": [{"path": "data/demo/train.jsonl", "format": "auto", "weight": 1.0}]},
    }
    resources = {"seconds": {"load": 4.2, "train": 131.7, "export": 9.0, "score": 7322.0}, "peak_memory_bytes": 2.1e9}
    return {
        "recipe": recipe,
        "data": {"data/demo/train.jsonl": "ab" * 32},
        "versions": {"torch": "2.13.0", "trl": "1.16.0"},
        "commit": "5df27cb0123456789abcdef0123456789abcdef0+changes",
        "device": "cpu",
        "resources": {**resources, "peak_gpu_memory_bytes": None},
    } | changes


def ledger():
    def file(split, rows, **changes):
        counts = {"rows": rows, "used": rows, "tokens": 95 * rows, "supervised_tokens": 38 * rows}
        return {
            "split": split,
            "path": f"data/demo/{split}.jsonl",
            "weight": 1.0,
            "sha256": "ab" * 32,
            "format": "conversation",
            "trimmed": [],
            "supervised_share": 0.4,
            "notes": {},
            "dropped": {},
        } | (counts | changes)

    texts = ["<|im_start|>system\nYou are Maren.<|im_end|>\n<|im_start|>user\nHow  deep\tis it?<|im_end|>\n"]
    texts += ["<|im_start|>assistant\n", "Aye, friend. Forty fathoms.<|im_end|>", "\n"]
    return {
        "files": [
            file("train", 1180, used=1176, dropped={"bad row": [7, 19, 23, 88]}, notes={"empty think blocks": 3}),
            file("validation", 60, trimmed=[12]),
            file("test", 32),
        ],
        "rows": {"train": 1176, "validation": 60, "test": 32},
        "duplicates": {"rows": 1, "named": ["data/demo/train.jsonl:9 = data/demo/train.jsonl:4"]},
        "test_in_train": {"rows": 2, "named": ["data/demo/test.jsonl:3", "data/demo/test.jsonl:8"]},
        "packing": {"train": 140},
        "samples": [
            {
                "split": "train",
                "place": "data/demo/train.jsonl:1",
                "pieces": [[text, i == 2] for i, text in enumerate(texts)],
            },
        ],
    }


def state(steps=240):
    rng, log = random.Random(0), []
    for step in range(0, steps + 1, steps // 3):
        log.append({"step": step, "epoch": 3 * step / steps, "eval_loss": 1.1 + 2.1 * math.exp(-4 * step / steps)})
    for step in range(1, steps + 1):
        loss = 0.9 + 2.3 * math.exp(-5 * step / steps) + rng.gauss(0, 0.15)
        rate = 2e-4 * min(step / 20, 1) * (1 - step / (steps + 1))
        log.append({"step": step, "epoch": 3 * step / steps, "loss": loss, "learning_rate": rate})
        log[-1]["grad_norm"] = abs(rng.gauss(0.8, 0.2))
    log.sort(key=lambda entry: entry["step"])
    log.append(
        {"step": steps, "epoch": 3.0, "train_runtime": 131.7, "train_samples_per_second": 26.8, "train_loss": 1.4}
    )
    return {"epoch": 3.0, "global_step": steps, "log_history": log}


def predictions(base=True):
    """The demo set's test split, answered by a model that knows its manner and, before, by one that does not."""
    rows = []
    for line, text in enumerate((DEMO / "test.jsonl").read_text(encoding="utf-8").splitlines(), start=1):
        row, messages = json.loads(text), []
        messages.append({"role": "system", "content": row["system"]})
        for turn, exchange in enumerate(row["conversation"], start=1):
            messages.append({"role": "user", "content": exchange["human"]})
            answer = exchange["assistant"]
            before = f"Sure! Here is some information about that. {exchange['human']} It depends on many factors."
            after = answer if line == 5 else "Hm." if line == 7 else f"Aye, friend. {answer[20:]} Keep your lamp lit."
            prediction = {
                "row": f"data/demo/test.jsonl:{line}",
                "turn": turn,
                "messages": list(messages),
                "reference": answer,
            }
            rows.append(prediction | {"base": before if base else None, "tuned": after})
            messages.append({"role": "assistant", "content": answer})
    return rows


def scores_of(rows):
    references = [row["reference"] for row in rows]
    base, tuned = ({"predictions": [row[model] for row in rows]} for model in ("base", "tuned"))
    finished = {"finished": [True] * len(rows)}
    metrics = ["chrf", "length_ratio", "stop_rate", "perplexity"]
    places = [row["row"] for row in rows]
    return score_answers(references, base | finished, tuned | finished, metrics, conversations=places)


def write_run(folder, **files):
    """A run's folder; files: stem=value, a list being JSON lines; without any, a whole and ordinary run."""
    if not files:
        rows = predictions()
        files = {"data_ledger": ledger(), "trainer_state": state(), "predictions": rows, "scores": scores_of(rows)}
    for stem, value in {"training_config": config(), **files}.items():
        lines = value if isinstance(value, list) else [value]
        name = f"{stem}.jsonl" if isinstance(value, list) else f"{stem}.json"
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def write_hostile_run(folder):
    """A run in which every text that comes from outside is hostile."""
    everything = "\n".join(HOSTILE)
    messages = [{"role": text, "content": text} for text in HOSTILE]
    rows = [
        {
            "row": f"{text}:{i}",
            "turn": 1,
            "messages": messages,
            "reference": everything,
            "base": text,
            "tuned": text[::-1],
        }
        for i, text in enumerate(HOSTILE)
    ]
    books = ledger()
    for file in books["files"]:
        file |= {"path": everything, "format": everything, "notes": {everything: 2}, "dropped": {everything: [1]}}
    for found in (books["duplicates"], books["test_in_train"]):
        found["named"] = list(HOSTILE)
    books["samples"] = [{"split": "train", "place": text, "pieces": [[text, False], [text, True]]} for text in HOSTILE]
    whole = {"score": 1.0, "low": 0.5, "high": 1.5, "signature": everything}
    table = {"rows": 8, "base": {}, "tuned": {}, "p_value": {}, "no_p_value": {}, "higher_is_better": {}}
    for text in HOSTILE:
        table["base"][text], table["tuned"][text] = whole, {"score": None, "reason": text}
        table["base"][text + "2"] = table["tuned"][text + "2"] = whole
        table["no_p_value"][text + "2"] = text
    recipe = config()["recipe"] | {"model_name_or_path": everything, "adapter_name_or_path": everything}
    settings = config(recipe=recipe, device=everything, commit=everything, versions={text: text for text in HOSTILE})
    files = {"training_config": settings, "data_ledger": books, "trainer_state": state(), "scores": table}
    return write_run(folder, **files, predictions=rows)


class Page(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.text += " " * (tag == "td")

    def handle_data(self, text):
        self.text += text

    @property
    def words(self):
        return " ".join(self.text.split())
