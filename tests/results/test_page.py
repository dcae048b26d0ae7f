"""The page of a run: what it says, that hostile text stays text, and that a browser shows it."""

import base64
import json
import math
import re
import shutil
import subprocess

import pytest

from sft.results.page import write_report
from sft.results.summary import run_summary
from tests.results.runs import HOSTILE, Page, config, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_page_says_in_a_sentence_what_was_trained(ordinary):
    sentence = "HuggingFaceTB/SmolLM2-135M-Instruct was trained by LoRA of rank 16 over 4-bit weights (nf4), on 1,176 "
    sentence += (
        "conversations, for 3 epochs (240 steps) at a learning rate of 0.0002, on a CPU, with version 5df27cb01234"
    )
    assert sentence + " of the code and changes since." in ordinary[1].words


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
    _, page, terminal_text = hostile
    for text in HOSTILE[:-1]:
        assert text in page.text
    assert "nul ␀ escape ␛[31m half \ufffd" in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", page.text + terminal_text)


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
    assert run_summary(tmp_path).startswith("HuggingFaceTB/SmolLM2-135M-Instruct was trained by LoRA of rank 16")


def test_smallest_config_is_enough(tmp_path):
    write_run(tmp_path, training_config={})
    assert "A model was trained by full fine-tuning." in Page(write_report(tmp_path)).words


def test_streamed_data_is_named_not_counted(tmp_path):
    books = {"streaming": True, "files": [{"split": "train", "path": "big.jsonl"}]}
    assert "not counted: big.jsonl" in Page(write_report(write_run(tmp_path, data_ledger=books))).words


@pytest.mark.parametrize(
    ("losses", "caption"),
    [
        ([2.5], "Training: 2.5."),
        ([2.5, math.nan, 1.5], "Training: from 2.5 to 1.5; not a number at 1 of 3 logged steps: 2."),
        ([math.inf, math.nan], "Training: nothing was logged; not a number at 2 of 2 logged steps: 1, 2."),
        ([], "Nothing was logged."),
    ],
)
def test_odd_logs_are_drawn_and_told(tmp_path, losses, caption):
    log = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    write_run(tmp_path, trainer_state={"epoch": 1.0, "global_step": len(losses), "log_history": log})
    assert caption in Page(write_report(tmp_path)).words
    assert run_summary(tmp_path)


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
