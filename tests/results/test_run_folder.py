"""Reading the folder of a run."""

import pytest

from sft.errors import UserError
from sft.results.page import write_report
from sft.results.summary import run_summary
from tests.results.runs import state, write_run


def test_run_without_a_config_is_a_users_mistake(tmp_path):
    for make in (write_report, run_summary):
        with pytest.raises(UserError, match="there is no .*training_config.json"):
            make(tmp_path)


def test_broken_file_is_named(tmp_path):
    write_run(tmp_path, trainer_state=state())
    (tmp_path / "scores.json").write_text('{"rows": 3', encoding="utf-8")
    with pytest.raises(UserError, match=r"scores\.json is not JSON"):
        write_report(tmp_path)
