"""Scores as a person reads them."""

import pytest

from sft.results.words import score_table


def one_score(base, tuned, p=None, higher=True, reason="it takes 20 rows or conversations, there are 8"):
    entries = [
        {"score": value, "low": value, "high": value} if isinstance(value, float) else value for value in (base, tuned)
    ]
    table = {"rows": 8, "base": {"m": entries[0]}, "tuned": {"m": entries[1]}, "higher_is_better": {"m": higher}}
    table |= {"p_value": {}, "no_p_value": {"m": reason}} if p is None else {"p_value": {"m": p}, "no_p_value": {}}
    return score_table(table)[0]


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
    (row,) = score_table({"rows": 8, "tuned": {"m": {"score": 41.26, "low": 38.0, "high": 44.04, "signature": "v1"}}})
    assert row[2:] == (None, ("41.3", "38.0–44.0"), "", "only one model was scored", "v1")
