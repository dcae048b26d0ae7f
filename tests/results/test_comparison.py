"""--compare: which rows, which scores, what differs, where it is written, and what is refused."""

import json
import re
import shutil

import pytest
from rich.cells import cell_len

import run_sft
from sft.results.comparison import by_spread, common_rows, compare_runs, headline
from sft.results.page import write_comparison
from sft.results.run_folder import read_run
from sft.results.summary import comparison_summary
from tests.results.runs import HOSTILE, Page, config, ledger, predictions, scores_of, state, write_run


def make(folder, rows, metrics=("chrf", "exact_match"), scores=None, rate=2e-4, **changes):
    folder.mkdir(parents=True)
    settings = config(**changes)
    settings["recipe"] = settings["recipe"] | {"output_dir": str(folder), "evaluation": {"metrics": list(metrics)}}
    settings["recipe"]["training_args"] = settings["recipe"]["training_args"] | {"learning_rate": rate}
    files = {"training_config": settings, "data_ledger": ledger(), "trainer_state": state()}
    return write_run(folder, **files, predictions=rows, scores=scores or scores_of(rows))


@pytest.fixture(scope="module")
def scores():
    return scores_of(predictions())


@pytest.fixture(scope="module")
def runs(tmp_path_factory, scores):
    """A answers as the demo's keeper, B as the untrained model does, and C as A, but on another file in part."""
    root = tmp_path_factory.mktemp("runs")
    a, b, c = predictions(), predictions(), predictions()
    for row in b:
        row["tuned"] = row["base"]
    for row in c:
        row["row"] = row["row"].replace("test", "other")
    c = [*c[:1:-1], c[5], c[5] | {"reference": "Something else."}]
    other = {"commit": "aaaabbbbccccdddd", "data": {"data/demo/train.jsonl": "cd" * 32}}
    return [
        make(root / "a", a, scores=scores),
        make(root / "b", b, scores=scores, rate=1e-3, **other),
        make(root / "c", c, scores={**scores, "rows": len(c)}, rate=2e-4),
    ]


@pytest.fixture(scope="module")
def compared(runs):
    return compare_runs(runs[:2])


def entries(comparison, name):
    return next(score for score in comparison.scores if score.name == name)


def test_rows_are_matched_by_messages_and_reference_wherever_they_stand(runs):
    rows = common_rows([read_run(run) for run in (runs[0], runs[2])])
    assert [row.place for row in rows] == [row["row"] for row in predictions()[2:]], "in the order of the first run"
    assert compare_runs([runs[0], runs[2]]).left_out == [2, 2], "two that C lacks; one twice in C, and one of its own"


def test_a_row_that_both_hold_twice_counts_twice(tmp_path):
    twice = [*predictions()[:3], predictions()[0]]
    folders = [make(tmp_path / name, twice, scores={"rows": 4, "tuned": {}, "higher_is_better": {}}) for name in "ab"]
    assert len(common_rows([read_run(folder) for folder in folders])) == 4


def test_scores_of_texts_are_what_the_run_itself_has_computed(compared, scores):
    for name in ("chrf", "length_ratio"):
        ours, theirs = entries(compared, name).entries[0], scores["tuned"][name]
        assert {key: ours[key] for key in ("score", "low", "high")} == {
            key: theirs[key] for key in ("score", "low", "high")
        }


def test_runs_are_compared_as_base_and_tuned_are(compared, scores):
    """B answers as the base does that A began from: the same paired bootstrap, the other way round."""
    against = entries(compared, "chrf").against[0]
    assert against.verdict == f"worse, p = {scores['p_value']['chrf']:.2g}" == "worse, p = 0.001"
    assert against.low < against.difference < against.high < 0
    assert entries(compared, "length_ratio").against[0].verdict == "", "neither more nor less of it is better"


def test_a_metric_that_no_run_was_scored_by_but_a_recipe_asks_for_is_computed(compared, scores):
    assert "exact_match" not in scores["tuned"]
    assert entries(compared, "exact_match").entries[0]["score"] == pytest.approx(100 / 38)


def test_the_headline_is_the_verdicts(compared, runs):
    assert headline(compared) == "On 38 answers to the same test rows B is worse than A by chrf (p < 0.05)."
    same = headline(compare_runs([runs[0], runs[2]]))
    assert same == "On 36 answers to the same test rows no score tells B from A clearly (p < 0.05)."


def stored(tmp_path, runs, change):
    """Run A and its copy, whose scores.json is changed."""
    folder = shutil.copytree(runs[0], tmp_path / "copy")
    values = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    change(values)
    (folder / "scores.json").write_text(json.dumps(values), encoding="utf-8")
    return compare_runs([runs[0], folder])


def test_scores_of_more_than_texts_stand_as_they_were_without_a_verdict(tmp_path, runs, scores):
    score = entries(stored(tmp_path, runs, lambda values: None), "stop_rate")
    assert score.entries == [scores["tuned"]["stop_rate"]] * 2
    assert score.against[0].verdict == "no verdict: predictions.jsonl does not hold what it is computed from"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: v["tuned"]["stop_rate"].update(signature="v2"), "it was not computed alike (the signatures differ)"),
        (lambda v: v["tuned"].pop("stop_rate"), "B has no such score"),
        (lambda v: v.update(rows=39), "it cannot be computed for the common rows alone"),
    ],
    ids=["signature", "absent", "other rows"],
)
def test_what_cannot_be_compared_is_said(tmp_path, runs, change, reason):
    comparison = stored(tmp_path, runs, change)
    assert "stop_rate" not in {score.name for score in comparison.scores}
    (note,) = [note for note in comparison.notes if "stop_rate" in note]
    assert note.startswith("not compared: ") and note.endswith(reason)


def test_other_languages_models_and_generation_are_said(tmp_path, runs):
    def change(values):
        values |= {"language": "zh", "model": "final"}

    notes = " / ".join(stored(tmp_path, runs, change).notes)
    assert "scored as another language each (A other, B zh); here all are scored as A was" in notes
    assert "other models answered (evaluation.model): A unknown, B final" in notes


def test_only_keys_that_differ_are_listed(compared):
    assert compared.recipe == [("training_args.learning_rate", ["0.0002", "0.001"])]
    assert compared.origin == [
        ("commit", ["5df27cb01234 with changes", "aaaabbbbcccc"]),
        ("data.data/demo/train.jsonl", ["abababababab", "cdcdcdcdcdcd"]),
    ]


def test_training_figures_stand_side_by_side(compared):
    figures = dict(compared.training)
    assert figures["steps"] == ["240", "240"] and figures["training time"] == ["2 min 12 s", "2 min 12 s"]
    assert figures["tokens of the training files"] == ["112,100", "112,100"]
    assert figures["last training loss"] == ["0.866", "0.866"] and figures["last validation loss"] == ["1.14", "1.14"]
    assert "peak GPU memory" not in figures, "no run has it"


def test_replies_in_which_the_runs_differ_most_come_first(compared):
    spreads = [abs(scores[0] - scores[1]) for _, scores in by_spread(compared.rows)]
    assert spreads == sorted(spreads, reverse=True) and spreads[0] > 60 > spreads[-1]


def test_command_writes_a_page_beside_older_ones_and_ends_in_the_next_command(runs, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    command = ["--compare", str(runs[0]), str(runs[1])]
    for folder in ("comparison_a_b", "comparison_a_b_2"):
        assert run_sft.main(command) == 0
        printed = capfd.readouterr().out
        assert printed.endswith(
            f"wrote output/{folder}/comparison.html\nnext: python -m webbrowser output/{folder}/comparison.html\n"
        )
    assert run_sft.main([*command, "--output", "mine"]) == 0
    before = (tmp_path / "mine/comparison.html").read_bytes()
    assert run_sft.main([*command, "--output", "mine"]) == 2
    assert "mine holds a comparison.html already" in capfd.readouterr().err
    assert (tmp_path / "mine/comparison.html").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "output"]


def test_page_is_one_file_without_script_that_holds_all(compared, tmp_path):
    page = Page(write_comparison(compared, tmp_path / "new"))
    assert not {"script", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    targets = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert targets and all(target.startswith("#") or target == "data:," for target in targets)
    assert "default-src 'none'" in str(page.attributes)
    assert page.tags.count("svg") == 3 and "Comparison of 2 runs" in page.words
    for words in (
        "worse, p\u00a0=\u00a00.001",
        "training_args.learning_rate",
        "A: from 3.29 to 0.866",
        "Keep your lamp lit.",
    ):
        assert words in page.text


def test_hostile_text_stays_text_and_the_terminal_shows_80_columns(tmp_path):
    everything = "\n".join(HOSTILE).replace("\ud800", "")
    rows = predictions()[:3]
    for row in rows:
        row |= {"row": everything, "tuned": everything, "messages": [{"role": everything, "content": everything}]}
    table = {"rows": 3, "tuned": {everything: {"score": None, "reason": everything}}, "higher_is_better": {}}
    folders = [make(tmp_path / name, rows, ["chrf"], table, device=everything + name) for name in ("灯塔" * 20, "b")]
    comparison = compare_runs(folders)
    page = Page(write_comparison(comparison, tmp_path / "page"))
    summary = comparison_summary(comparison, tmp_path / "page/comparison.html")
    assert not {"script", "img"} & set(page.tags)
    for text in HOSTILE[:-1]:
        assert text in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", page.text + summary)
    assert max(cell_len(line) for line in summary.splitlines() if "comparison.html" not in line) <= 80


def broken(folder, name, content):
    (folder / name).write_text(content, encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: shutil.rmtree(f), "there is no {f}/training_config.json; name the folder of a run"),
        (lambda f: (f / "scores.json").unlink(), "there is no {f}/scores.json, or it is empty; score the run: python"),
        (lambda f: broken(f, "predictions.jsonl", ""), "there is no {f}/predictions.jsonl, or it is empty; score"),
        (lambda f: broken(f, "scores.json", '{"rows": 3'), "{f}/scores.json is not JSON: "),
        (lambda f: broken(f, "scores.json", "[3]"), "{f}/scores.json holds no scores of a trained model; score"),
        (lambda f: broken(f, "predictions.jsonl", '{"row": "a"}\n{'), "{f}/predictions.jsonl:2 is not JSON: "),
        (
            lambda f: broken(f, "predictions.jsonl", '{"row": "a"}\n'),
            "{f}/predictions.jsonl:1 is no answer of a trained",
        ),
        (
            lambda f: broken(f, "predictions.jsonl", json.dumps(predictions()[0] | {"tuned": "\ud800"})),
            "{f}/predictions.jsonl:1 is no answer of a trained model; score the run",
        ),
        (
            lambda f: broken(f, "trainer_state.json", "[]"),
            "{f}/trainer_state.json is not what a run writes; restore it",
        ),
    ],
)
def test_a_folder_that_is_no_scored_run_is_told_in_one_message(runs, tmp_path, capfd, monkeypatch, damage, said):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(runs[0], tmp_path / "copy")
    damage(folder)
    assert run_sft.main(["--compare", str(runs[1]), str(folder)]) == 2
    error = capfd.readouterr().err
    assert said.format(f=folder) in error and error.count("\n") == 1
    assert not (tmp_path / "output").exists()


def test_runs_that_cannot_be_compared_are_told(runs, tmp_path, capfd):
    rows = [row | {"row": "mine.jsonl:1", "reference": "Nothing alike."} for row in predictions()[:1]]
    other = make(tmp_path / "other", rows)
    for folders, said in (
        ([runs[0]], "--compare takes 2 to 6 folders of runs, found 1"),
        ([runs[0], runs[1], runs[0] / "../a"], "a is named twice; a run is compared with others"),
        ([runs[0], other], f"{runs[0]} on data/demo/test.jsonl; {other} on mine.jsonl; score one on the other's file"),
    ):
        assert run_sft.main(["--compare", *map(str, folders)]) == 2
        assert said in capfd.readouterr().err


@pytest.mark.parametrize("arguments", [["x.yaml", "--compare", "a", "b"], ["x.yaml", "--output", "a"], ["--compare"]])
def test_compare_stands_alone(arguments):
    with pytest.raises(SystemExit) as stopped:
        run_sft.main(arguments)
    assert stopped.value.code == 2
