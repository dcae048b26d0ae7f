import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from rouge_score import rouge_scorer

from sft.errors import RecipeError
from sft.results.scores import (
    FOLDER,
    compare,
    language_of,
    load_metric,
    measure,
    metric_names,
    row_scores,
    score_answers,
)

ENGLISH = (  # reference, answer
    ("The cat sat on the mat, didn't it?", "The cat sat on a mat; didn't it?"),
    ("Prices rose 3.5% in May & June.", "In May and June prices rose by 3.5%."),
    ("I never touch coffee after noon.", "I never touch coffee after noon."),
    ("No.", "I would rather not say anything about that."),
    ("Take the second street on the left, then ask again.", ""),
)
CHINESE = (
    ("我明天早上九点去北京开会。", "我明天上午九点到北京开会。"),
    ("这本书叫《红楼梦》，作者是曹雪芹。", "《红楼梦》的作者是曹雪芹。"),
    ("请用 Python 3 写一个函数。", "请用 Python 写一个函数！"),
    ("不知道", "不知道"),
)
LANGUAGES = pytest.mark.parametrize(("pairs", "tokenize"), [(ENGLISH, "13a"), (CHINESE, "zh")])


def columns(pairs):
    return [reference for reference, _ in pairs], {"predictions": [answer for _, answer in pairs]}


def uncomputable(metric, references, **answers):
    return score_answers(references, answers, metrics=[metric], language="other")["base"]


@LANGUAGES
def test_bleu_and_chrf_print_what_the_sacrebleu_command_prints(pairs, tokenize, tmp_path):
    references, answers = columns(pairs)
    for name, lines in (("references", references), ("answers", answers["predictions"])):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    command = "-m sacrebleu references -i answers -m bleu chrf -w 10 --tokenize".split()
    printed = subprocess.run(
        [sys.executable, *command, tokenize],
        cwd=tmp_path,
        env={**os.environ, "PYTHONUTF8": "1"},
        capture_output=True,
        check=True,
    )
    ours = score_answers(references, answers, metrics=["bleu", "chrf"])["base"]
    for name, theirs in zip(("bleu", "chrf"), json.loads(printed.stdout), strict=True):
        assert f"{ours[name]['score']:.10f}" == f"{theirs['score']:.10f}"
        assert ours[name]["signature"].startswith(theirs["signature"] + "|bs:1000|seed:0")


def test_english_rouge_is_rouge_score():
    references, answers = columns(ENGLISH)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    rows = [scorer.score(reference, answer) for reference, answer in ENGLISH]
    ours = score_answers(references, answers, metrics=["rouge"])["base"]
    for name in scorer.rouge_types:
        assert f"{ours[name]['score']:.10f}" == f"{100 * sum(row[name].fmeasure for row in rows) / len(rows):.10f}"


def test_chinese_rouge_is_rouge_over_characters_and_latin_words():
    def f1(matches, a, b):
        return 2 * matches / (a + b)  # the harmonic mean of matches / a and matches / b

    def ngram_f1(a, b, n):
        a, b = (Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for tokens in (a, b))
        return f1((a & b).total(), a.total(), b.total())

    @cache
    def longest(a, b):
        if not a or not b:
            return 0
        return 1 + longest(a[1:], b[1:]) if a[0] == b[0] else max(longest(a[1:], b), longest(a, b[1:]))

    token = re.compile(r"[a-z0-9]+|[\u4e00-\u9fff]")
    rows = [tuple(tuple(token.findall(text.lower())) for text in pair) for pair in CHINESE]
    assert rows[2][0] == ("请", "用", "python", "3", "写", "一", "个", "函", "数")
    expected = {
        "rouge1": [ngram_f1(*row, 1) for row in rows],
        "rouge2": [ngram_f1(*row, 2) for row in rows],
        "rougeL": [f1(longest(*row), *map(len, row)) for row in rows],
    }
    references, answers = columns(CHINESE)
    ours = score_answers(references, answers, metrics=["rouge"])["base"]
    for name, values in expected.items():
        assert f"{ours[name]['score']:.10f}" == f"{100 * sum(values) / len(values):.10f}"


@pytest.mark.parametrize("language", ["ja", "th"])
def test_japanese_and_thai_are_scored_by_character(language):
    text, other = {"ja": ("雨が降る", "雨が止む"), "th": ("กาแฟ", "กาแดง")}[language]
    same = {"ja": 2, "th": 3}[language]  # 雨, が; ก, า, แ
    ours = score_answers([text], {"predictions": [other]}, metrics=["bleu", "rouge"])
    assert ours["language"] == language
    assert ours["base"]["rouge1"]["score"] == pytest.approx(100 * 2 * same / (len(text) + len(other)))
    assert "|tok:char|" in ours["base"]["bleu"]["signature"]
    assert ours["base"]["bleu"]["signature"].endswith(f"|language:{language}|chosen-by:script")


def test_the_other_scores_are_these_literals():
    references = ["a b c", "d e"]
    answers = {
        "predictions": ["a b a b", " d e\n"],
        "finished": [True, False],
        "loss_sum": [3 * np.log(2), 5 * np.log(2)],
        "correct": [1, 2],
        "tokens": [3, 5],
    }
    names = ["exact_match", "length_ratio", "stop_rate", "distinct_2", "perplexity", "token_accuracy"]
    ours = score_answers(references, answers, metrics=names)["base"]
    assert {name: round(ours[name]["score"], 9) for name in names} == {
        "exact_match": 50.0,  # the second row
        "length_ratio": 1.2,  # 6 tokens for 5
        "stop_rate": 50.0,
        "distinct_2": 75.0,  # ab, ba, de among ab, ba, ab, de
        "perplexity": 2.0,
        "token_accuracy": 37.5,  # 3 of 8
    }


def test_a_language_set_in_the_recipe_is_used_and_named():
    references, answers = columns(CHINESE)
    ours = score_answers(references, answers, metrics=["bleu"], language="other")
    assert ours["language"] == "other"
    assert "|tok:13a|" in ours["base"]["bleu"]["signature"]
    assert ours["base"]["bleu"]["signature"].endswith("|language:other|chosen-by:recipe")
    with pytest.raises(RecipeError, match="unknown language 'fr'; there are zh, ja, th, other"):
        score_answers(references, answers, language="fr")


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("abcdefg汉字字", "zh"),  # 3 of 10 letters
        ("abcdefgh汉字", "other"),  # 2 of 10
        ("汉汉汉汉汉汉汉汉汉の", "ja"),  # kana: 1 of 10
        ("汉汉汉汉汉汉汉汉汉汉の", "zh"),  # 1 of 11
        ("カタカナ", "ja"),
        ("abcdefgกาก", "th"),  # 3 of 10, the vowel sign being a letter
        ("안녕하세요", "other"),
        ("123 ...！", "other"),
        ("", "other"),
    ],
)
def test_the_language_is_chosen_by_the_share_of_its_letters(text, language):
    assert language_of([text]) == language_of(list(text)) == language


def test_every_metric_loads_with_evaluate_offline_from_another_folder_in_two_processes_at_once(tmp_path):
    program = (
        "import evaluate, sys\n"
        "for path in sys.argv[1:]:\n"
        "    metric = evaluate.load(path)\n"
        "    columns = {'string': ['a b', 'c d'], 'bool': [True, False], 'float64': [1.0, 2.0], 'int64': [1, 2]}\n"
        "    result = metric.compute(**{name: columns[value.dtype] for name, value in metric.features.items()})\n"
        "    print({name: value for name, value in result.items() if name != 'row_statistics'})\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "work").mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *(str(FOLDER / name) for name in metric_names())],
            cwd=tmp_path / "work",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert printed[0] == printed[1]
    assert len(printed[0][0].splitlines()) == len(metric_names())
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("metric", metric_names())
def test_the_score_of_the_summed_rows_is_the_score(metric):
    references, answers = columns(ENGLISH)
    answers |= {"finished": [True, False] * 2 + [True], "loss_sum": [1.5, 2.0, 0.5, 4.0, 3.0]}
    answers |= {"correct": [1, 0, 2, 1, 1], "tokens": [9, 8, 6, 2, 11]}
    whole = measure(metric, load_metric(metric), {**answers, "references": references}, "other", [np.ones(5)])
    assert whole.scores
    for name, value in whole.scores.items():
        assert whole.resampled[name].tolist() == [pytest.approx(value, rel=1e-12)]


def test_rows_that_are_all_equal_give_an_interval_without_width():
    entry = score_answers(["a b c d e"] * 4, {"predictions": ["a b c d"] * 4}, metrics=["bleu"])["base"]["bleu"]
    assert entry["low"] == entry["score"] == entry["high"] == pytest.approx(100 * np.exp(1 - 5 / 4))


def test_the_interval_of_a_share_is_that_of_its_binomial():
    answers = ["yes"] * 50 + ["no"] * 50
    entry = score_answers(["yes"] * 100, {"predictions": answers}, metrics=["exact_match"])["base"]["exact_match"]
    assert entry["score"] == 50
    assert abs(entry["low"] - 40) <= 1 and abs(entry["high"] - 60) <= 1  # 50 -+ 1.96 * sqrt(0.5 * 0.5 / 100)
    again = score_answers(["yes"] * 100, {"predictions": answers}, metrics=["exact_match"])["base"]["exact_match"]
    assert entry == again


def test_turns_of_a_conversation_are_drawn_together():
    answers, ids = ["yes"] * 50 + ["no"] * 50, [row // 50 for row in range(100)]
    entry = score_answers(["yes"] * 100, {"predictions": answers}, metrics=["exact_match"], conversations=ids)["base"]
    assert (entry["exact_match"]["low"], entry["exact_match"]["high"]) == (0, 100)


def test_distinct_2_lies_within_its_interval():
    answers = [f"w{row} x{row} the same" for row in range(30)]
    entry = score_answers(["r"] * 30, {"predictions": answers}, metrics=["distinct_2"])["base"]["distinct_2"]
    assert entry["score"] == pytest.approx(100 * 61 / 90)
    assert entry["low"] <= entry["score"] * (1 + 1e-12) and entry["score"] <= entry["high"] * (1 + 1e-12)


def test_a_clearly_better_model_has_the_least_p_value():
    references = [f"row {n} says {n * n} and no more" for n in range(20)]
    result = score_answers(
        references, {"predictions": ["?"] * 20}, {"predictions": references}, ["chrf", "bleu", "rouge"]
    )
    assert set(result["p_value"]) == {"chrf", "bleu", "rouge1", "rouge2", "rougeL"}
    assert set(result["p_value"].values()) == {1 / 1001}


def test_equal_answers_have_a_p_value_of_one():
    references, answers = columns(ENGLISH * 4)
    result = score_answers(references, answers, answers, ["chrf", "rouge"])
    assert result["p_value"] == {"chrf": 1, "rouge1": 1, "rouge2": 1, "rougeL": 1}
    assert result["base"] == result["tuned"]


def test_a_p_value_counts_resamples_as_far_from_the_difference_as_it_is_from_zero():
    class Side:
        def __init__(self, whole, resampled):
            self.scores, self.resampled, self.reason = {"m": whole}, {"m": np.array(resampled)}, ""

    base, tuned = Side(1.0, [1.0, 1.0, 1.0, 1.0]), Side(3.0, [3.5, 1.0, 5.5, np.nan])
    assert compare("m", base, tuned, True, 20) == (1 + 2) / (1 + 3)  # 0.5, -2 and 2.5 from 2; one has no score
    assert compare("m", base, tuned, True, 19) == "it takes 20 rows or conversations, there are 19"


def test_a_length_ratio_has_no_p_value_and_says_why():
    references, answers = columns(ENGLISH * 4)
    result = score_answers(references, answers, answers, ["length_ratio"])
    assert result["p_value"] == {}
    assert result["no_p_value"] == {"length_ratio": "neither more nor less of it is better"}
    assert result["higher_is_better"] == {"length_ratio": None}


def test_a_score_that_cannot_be_computed_says_why():
    answers = {"predictions": ["a b"]}
    textless = {"score": None, "reason": "no reference has any text"}
    for metric in ("bleu", "chrf", "length_ratio"):
        assert uncomputable(metric, [" "], **answers) == {metric: textless}
    assert uncomputable("exact_match", [], predictions=[])["exact_match"]["reason"] == "there is no row to score"
    assert uncomputable("stop_rate", [], finished=[])["stop_rate"]["reason"] == "there is no row to score"
    assert uncomputable("distinct_2", ["a"], predictions=["a"])["distinct_2"]["reason"] == "no answer has two tokens"
    reason = "rouge-score reads only a-z and 0-9, and most letters of the references are others"
    assert uncomputable("rouge", ["привет, bob"], **answers)["rougeL"] == {"score": None, "reason": reason}
    assert uncomputable("rouge", ["..."], **answers)["rouge1"]["reason"] == "no reference has a letter or a digit"
    for metric in ("perplexity", "token_accuracy"):
        zero = {"loss_sum": [0.0], "correct": [0], "tokens": [0]}
        assert uncomputable(metric, ["a"], **zero)[metric]["reason"] == "no reference has a token"
    infinite = uncomputable("perplexity", ["a"], loss_sum=[float("nan")], tokens=[1])["perplexity"]
    assert infinite == {"score": None, "reason": "the score is not a finite number"}
    assert uncomputable("stop_rate", ["a"], **answers)["stop_rate"]["reason"] == "the answers come without finished"


def test_no_metric_scores_an_empty_file():
    nothing = dict.fromkeys(["predictions", "finished", "loss_sum", "correct", "tokens"], [])
    result = score_answers([], nothing, nothing, metric_names())
    assert result["rows"] == 0 and result["p_value"] == {} and set(result["no_p_value"]) == set(result["base"])
    assert {entry["score"] for entry in result["base"].values()} == {None}
    assert all(entry["reason"] for entry in result["base"].values())


def test_a_row_score_is_the_score_of_that_row_alone():
    references, answers = columns(ENGLISH)
    rows = row_scores("chrf", references, answers)["chrf"]
    alone = [score_answers([r], {"predictions": [a]}, metrics=["chrf"])["base"]["chrf"]["score"] for r, a in ENGLISH]
    assert rows.tolist() == alone
    assert (rows[2], rows[4]) == (100, 0)


def test_a_metric_is_one_new_file(tmp_path):
    source = """
import datasets
import evaluate


class Shortest(evaluate.Metric):
    higher_is_better = False

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions):
        return {"shortest": min(map(len, predictions)), "signature": "version:1"}
"""
    (tmp_path / "shortest").mkdir()
    (tmp_path / "shortest" / "shortest.py").write_text(source, encoding="utf-8")
    assert metric_names(tmp_path) == ["shortest"]
    result = score_answers(["r"] * 4, {"predictions": ["a", "bb", "bb", "bb"]}, metrics=["shortest"], folder=tmp_path)
    entry = {"score": 1.0, "low": 1.0, "high": 2.0, "signature": "version:1|bs:1000|seed:0"}
    assert result["base"] == {"shortest": entry}
    rows = row_scores("shortest", ["r", "r"], {"predictions": ["a", "bb"]}, folder=tmp_path)
    assert rows["shortest"].tolist() == [1, 2]


def test_an_unknown_metric_names_the_nearest_one():
    with pytest.raises(RecipeError, match=r"unknown metric 'rogue'; did you mean 'rouge'\? there are bleu, chrf, "):
        load_metric("rogue")


def test_listing_metrics_imports_neither_torch_nor_evaluate():
    program = "import sys; from sft.results import scores; scores.metric_names(); "
    program += "print({'torch', 'evaluate'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    assert subprocess.check_output([sys.executable, "-c", program], cwd=root, text=True).strip() == "set()"
