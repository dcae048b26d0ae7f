"""Which answers are shown."""

import pytest

from sft.results.page import write_report
from sft.results.replies import choose_replies
from sft.results.run_folder import read_run
from tests.results.runs import Page, predictions, write_run


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
