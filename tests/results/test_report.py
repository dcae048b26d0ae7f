import base64
import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sft.errors import UserError
from sft.results.page import choose_replies, read_run, score_rows, summary, write_report
from sft.results.scores import score

DEMO = Path(__file__).resolve().parents[2] / "data" / "demo"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
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


# ------------------------------------------------------------------------------------------------- folders of runs


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

    said = ["<|im_start|>system\nYou are Maren.<|im_end|>\n<|im_start|>user\nHow  deep\tis it?<|im_end|>\n"]
    said += ["<|im_start|>assistant\n", "Aye, friend. Forty fathoms.<|im_end|>", "\n"]
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
            {"place": "data/demo/train.jsonl:1", "pieces": [[text, i == 2] for i, text in enumerate(said)]},
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
            told = {
                "row": f"data/demo/test.jsonl:{line}",
                "turn": turn,
                "messages": list(messages),
                "reference": answer,
            }
            rows.append(told | {"base": before if base else None, "tuned": after})
            messages.append({"role": "assistant", "content": answer})
    return rows


def scores_of(rows):
    references = [row["reference"] for row in rows]
    base, tuned = ({"predictions": [row[model] for row in rows]} for model in ("base", "tuned"))
    finished = {"finished": [True] * len(rows)}
    return score(references, base | finished, tuned | finished, ["chrf", "length_ratio", "stop_rate", "perplexity"])


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
    books["samples"] = [{"place": text, "pieces": [[text, False], [text, True]]} for text in HOSTILE]
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


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("ordinary"))
    return folder, Page(write_report(folder)), summary(folder)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = write_hostile_run(tmp_path_factory.mktemp("hostile"))
    return folder, Page(write_report(folder)), summary(folder)


# -------------------------------------------------------------------------------------------------------- the page


def test_page_says_in_a_sentence_what_was_trained(ordinary):
    told = "HuggingFaceTB/SmolLM2-135M-Instruct was trained by LoRA of rank 16 over 4-bit weights (nf4), on 1,176 "
    told += (
        "conversations, for 3 epochs (240 steps) at a learning rate of 0.0002, on a CPU, at commit 5df27cb01234 with"
    )
    assert told + " uncommitted changes." in ordinary[1].words


def test_page_says_whether_the_model_got_better(ordinary):
    assert "On 38 test answers the trained model is better by chrf (p < 0.05)." in ordinary[1].words


def test_page_holds_losses_ledger_time_recipe_and_versions(ordinary):
    for words in (
        "Training: from 3.29 to 0.866",
        "Validation: from 3.2 to 1.14",
        "train: 1,176 conversations packed into 140 rows",
        "in the training split too, so that the scores flatter: 2 (data/demo/test.jsonl:3, data/demo/test.jsonl:8)",
        "Training rows that repeat an earlier one: 1 (data/demo/train.jsonl:9 = data/demo/train.jsonl:4)",
        "data/demo/train.jsonl: 4 dropped for bad row, at line 7, 19, 23, 88",
        "data/demo/validation.jsonl: 1 trimmed to dataset.max_length, at line 12",
        "data/demo/train.jsonl: 3 empty think blocks",
        "training 2 min 12 s",
        "scoring 2 h 2 min",
        "peak memory 2.1 GB",
        "target_modules: all-linear",
        "torch 2.13.0, trl 1.16.0",
    ):
        assert words in ordinary[1].words


def test_mask_underlines_the_answer_and_shows_white_space(ordinary):
    page = (ordinary[0] / "report.html").read_text(encoding="utf-8")
    marked = re.findall(r"<mark>(.*?)</mark>", page[page.index('<pre class="mask"') :], re.DOTALL)
    assert [re.sub("<.*?>", "", text) for text in marked] == ["Aye,·friend.·Forty·fathoms.&lt;|im_end|&gt;"]
    assert "How··deep⇥is·it?<|im_end|>↵" in ordinary[1].text


@pytest.mark.parametrize("kind", ["ordinary", "hostile"])
def test_page_is_one_file_without_script_that_asks_for_nothing(kind, request):
    folder, page, _ = request.getfixturevalue(kind)
    assert not {"script", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    targets = [
        value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data", "action")
    ]
    assert targets and all(target.startswith("#") or target == "data:," for target in targets)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert dict(page.attributes)["content"] != "" and "default-src 'none'" in str(page.attributes)
    styles = re.findall(r"<style>.*?</style>", (folder / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert len(styles) == 1 and "url(" not in styles[0] and "@import" not in styles[0]


def test_hostile_text_stays_text(hostile):
    _, page, told = hostile
    for text in HOSTILE[:-1]:
        assert text in page.text
    assert "nul ␀ escape ␛[31m half \ufffd" in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", page.text + told)


def test_every_table_has_headers_and_every_plot_words(ordinary):
    _, page, _ = ordinary
    assert ("lang", "en") in page.attributes
    assert (
        page.tags.count("svg")
        == 3
        == sum(name == "aria-label" and "by step" in value for name, value in page.attributes)
    )
    assert {value for name, value in page.attributes if name == "scope"} == {"row", "col"}
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_loss_png_is_a_png(ordinary):
    assert (ordinary[0] / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_same_run_gives_the_same_page(ordinary):
    before = (ordinary[0] / "report.html").read_bytes()
    assert write_report(ordinary[0]).read_bytes() == before


# ------------------------------------------------------------------------------------------------------ what is absent


def test_run_without_a_config_is_a_users_mistake(tmp_path):
    for make in (write_report, summary):
        with pytest.raises(UserError, match="there is no .*training_config.json"):
            make(tmp_path)


def test_broken_file_is_named(tmp_path):
    write_run(tmp_path, trainer_state=state())
    (tmp_path / "scores.json").write_text('{"rows": 3', encoding="utf-8")
    with pytest.raises(UserError, match=r"scores\.json is not JSON"):
        write_report(tmp_path)


def test_absent_files_are_said_in_a_line_each(tmp_path):
    settings = config()
    del settings["resources"]
    page = Page(write_report(write_run(tmp_path, training_config=settings)))
    for line in (
        "There are no scores (no scores.json).",
        "There is no log of the training (no trainer_state.json).",
        "There are no answers to show (no predictions.jsonl, or it is empty).",
        "No rows were kept to show their masks (no samples in data_ledger.json).",
        "There is no account of the data (no data_ledger.json).",
        "Neither was measured (no resources in training_config.json).",
    ):
        assert line in page.words
    assert (tmp_path / "loss.png").is_file()
    assert summary(tmp_path).startswith("HuggingFaceTB/SmolLM2-135M-Instruct was trained by LoRA of rank 16")


def test_smallest_config_is_enough(tmp_path):
    write_run(tmp_path, training_config={})
    assert "A model was trained by full fine-tuning." in Page(write_report(tmp_path)).words


def test_streamed_data_is_named_not_counted(tmp_path):
    books = {"streaming": True, "files": [{"split": "train", "path": "big.jsonl"}]}
    assert "not counted: big.jsonl" in Page(write_report(write_run(tmp_path, data_ledger=books))).words


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([2.5], "Training: 2.5."),
        ([2.5, math.nan, 1.5], "Training: from 2.5 to 1.5; not a number at 1 of 3 logged steps: 2."),
        ([math.inf, math.nan], "Training: nothing was logged; not a number at 2 of 2 logged steps: 1, 2."),
        ([], "Nothing was logged."),
    ],
)
def test_odd_logs_are_drawn_and_told(tmp_path, losses, told):
    log = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    write_run(tmp_path, trainer_state={"epoch": 1.0, "global_step": len(losses), "log_history": log})
    assert told in Page(write_report(tmp_path)).words
    assert summary(tmp_path)


# -------------------------------------------------------------------------------------------------- scores and replies


def one_score(base, tuned, p=None, higher=True, reason="it takes 20 rows or conversations, there are 8"):
    entries = [
        {"score": value, "low": value, "high": value} if isinstance(value, float) else value for value in (base, tuned)
    ]
    table = {"rows": 8, "base": {"m": entries[0]}, "tuned": {"m": entries[1]}, "higher_is_better": {"m": higher}}
    table |= {"p_value": {}, "no_p_value": {"m": reason}} if p is None else {"p_value": {"m": p}, "no_p_value": {}}
    return score_rows(table)[0]


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (one_score(1.0, 2.0, p=0.000999), "better, p = 0.001"),
        (one_score(2.0, 1.0, p=0.03), "worse, p = 0.03"),
        (one_score(2.0, 1.0, p=0.03, higher=False), "better, p = 0.03"),
        (one_score(1.0, 2.0, p=0.05), "no clear change, p = 0.05"),
        (one_score(1.0, 2.0), "no verdict: it takes 20 rows or conversations, there are 8"),
        (one_score(1.0, {"score": None, "reason": "no text"}), "cannot be computed: no text"),
    ],
)
def test_verdict_is_in_plain_words(row, verdict):
    assert row.verdict == verdict


def test_one_model_alone_gets_no_verdict():
    (row,) = score_rows({"rows": 8, "tuned": {"m": {"score": 41.26, "low": 38.0, "high": 44.04, "signature": "v1"}}})
    assert row[2:] == (None, ("41.3", "38.0–44.0"), "", "only one model was scored", "v1")


def test_best_and_worst_replies_are_those_whose_chrf_moved_most(ordinary):
    replies = choose_replies(read_run(ordinary[0]))
    assert [reply.group for reply in replies] == ["best"] * 7 + ["worst"] * 7 + ["random"] * 6
    assert len({(reply.row["row"], reply.row["turn"]) for reply in replies}) == 20
    change = [reply.after - reply.before for reply in replies]
    assert change[:7] == sorted(change[:7], reverse=True) and change[7:14] == sorted(change[7:14])
    assert max(change[7:]) <= min(change[:7]) and max(change[7:14]) <= min(change[14:])
    assert replies[7].row["row"] == "data/demo/test.jsonl:7"  # "Hm."
    assert "line 5" not in replies[0].row["row"] and replies == choose_replies(read_run(ordinary[0]))


@pytest.mark.parametrize(
    ("rows", "groups"), [([], []), (predictions()[:3], ["best"] * 3), (predictions(base=False), ["random"] * 20)]
)
def test_replies_are_those_that_there_are(tmp_path, rows, groups):
    write_run(tmp_path)
    write_run(tmp_path, predictions=rows)
    (tmp_path / "scores.json").unlink()
    assert [reply.group for reply in choose_replies(read_run(tmp_path))] == groups
    assert Page(write_report(tmp_path)).tags.count("article") == len(groups)


# ---------------------------------------------------------------------------------------------------------- the summary


def test_summary_says_loss_scores_replies_and_files(ordinary):
    folder, _, told = ordinary
    assert "\n  training              3.29       0.866\n  validation             3.2        1.14\n" in told
    assert re.search(r"\n  chrf  +17\.\d +87\.\d  better, p = 0\.001\n", told)
    assert "improved least, data/demo/test.jsonl:7\n  asked   How do I take care of a cactus?\n" in told
    assert "\n  after   Hm.\n" in told
    assert told.endswith(f"in {folder}:\n  report.html  loss.png  scores.json  predictions.jsonl")


def test_summary_fits_80_columns(hostile, tmp_path):
    rows = predictions()
    for row in rows:
        row["tuned"] = "今天天气很好。" * 30
    chinese = summary(write_run(tmp_path, predictions=rows))
    assert len(hostile[2].splitlines()) < 100
    for line in [*hostile[2].splitlines(), *chinese.splitlines()]:
        if str(tmp_path.parent) not in line:
            assert sum(2 if "一" <= letter <= "鿿" or letter == "。" else 1 for letter in line) <= 80


# -------------------------------------------------------------------------------------------------------- in a browser

PROBE = """<!doctype html><body><img src="http://probe.invalid/">
<iframe src="run/report.html" width="400" height="900"></iframe>
<iframe src="run/report.html" width="1400" height="900"></iframe>
<pre id="found"></pre><script>
onload = () => {
  console.error("an error of the probe");
  const found = [...document.querySelectorAll("iframe")].map(({contentDocument: page}) => ({
    title: page.title,
    text: page.body.textContent,
    width: page.documentElement.clientWidth,
    wanted: page.documentElement.scrollWidth,
    marks: page.querySelectorAll("mark").length,
    strangers: page.querySelectorAll("script, img, [onload], [onerror]").length,
    plots: [...page.querySelectorAll("figure svg")].map(plot => plot.getBoundingClientRect().width),
    margin: getComputedStyle(page.body).marginTop,
  }));
  document.getElementById("found").textContent = btoa(unescape(encodeURIComponent(JSON.stringify(found))));
};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.parametrize("kind", ["ordinary", "hostile"])
def test_chromium_shows_the_page_without_error_request_or_overflow(kind, request, tmp_path):
    (tmp_path / "run").symlink_to(request.getfixturevalue(kind)[0])
    (tmp_path / "probe.html").write_text(PROBE, encoding="utf-8")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet += " --disable-component-update --disable-sync --disable-dev-shm-usage --allow-file-access-from-files"
    command = [CHROMIUM, *quiet.split(), "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={tmp_path / 'net.json'}", "--dump-dom"]
    shown = subprocess.run(
        [*command, (tmp_path / "probe.html").as_uri()],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
    )
    # The probe's own error and picture show that others would be seen. What Chromium asks for itself has no origin.
    errors = re.findall(r":CONSOLE.*", shown.stderr)
    assert len(errors) == 1 and '"an error of the probe"' in errors[0]
    events = json.loads((tmp_path / "net.json").read_text(encoding="utf-8"))["events"]
    asked = {
        e["params"]["url"] for e in events if e.get("params", {}).get("initiator", "not an origin") != "not an origin"
    }
    assert asked == {"http://probe.invalid/"}
    found = json.loads(base64.b64decode(re.search(r'<pre id="found">(.+?)</pre>', shown.stdout)[1]))
    for page, width in zip(found, (400, 1400), strict=True):
        assert page["wanted"] <= page["width"] <= width
        assert page["title"].endswith(": report") and page["strangers"] == 0 and page["marks"] > 0
        assert page["margin"] == "0px" and all(300 < plot < 450 for plot in page["plots"])
        if kind == "hostile":
            assert all(text in page["text"] for text in HOSTILE[:-1])
