"""The summary on the terminal."""

import re

from sft.results.summary import run_summary
from tests.results.runs import predictions, write_run


def test_summary_says_loss_scores_replies_and_files(ordinary):
    folder, _, text = ordinary
    assert "\n  training              3.29       0.866\n  validation             3.2        1.14\n" in text
    assert re.search(r"\n  chrf  +17\.\d +87\.\d  better, p = 0\.001\n", text)
    assert "improved least, data/demo/test.jsonl:7\n  asked   How do I take care of a cactus?\n" in text
    assert "\n  after   Hm.\n" in text
    files = f"in {folder}:\n  report.html  loss.png  scores.json  predictions.jsonl"
    assert text.endswith(f"{files}\n\nnext: python -m webbrowser {folder / 'report.html'}")


def test_summary_fits_80_columns(hostile, tmp_path):
    rows = predictions()
    for row in rows:
        row["tuned"] = "今天天气很好。" * 30
    chinese = run_summary(write_run(tmp_path, predictions=rows))
    assert len(hostile[2].splitlines()) < 100
    for line in [*hostile[2].splitlines(), *chinese.splitlines()]:
        if str(tmp_path.parent) not in line:
            assert sum(2 if "一" <= letter <= "鿿" or letter == "。" else 1 for letter in line) <= 80


def test_reason_that_several_scores_share_is_said_once(tmp_path):
    reason = "it takes 20 rows or conversations to tell a change from chance, and there are 2"
    entry = {"score": 1.0, "low": None, "high": None}
    names = ("chrf", "bleu")
    scores = {"rows": 2, "base": dict.fromkeys(names, entry), "tuned": dict.fromkeys(names, entry)}
    scores |= {"no_p_value": dict.fromkeys(names, reason), "higher_is_better": dict.fromkeys(names, True)}
    text = run_summary(write_run(tmp_path, scores=scores))
    assert " ".join(text.split()).count(reason) == 1
    assert f"chrf, bleu: no verdict: {reason}" in " ".join(text.split())
