"""The live line of training, and what stands for it where nobody looks."""

import io
import re
from functools import partial
from types import SimpleNamespace

import pytest
from rich.console import Console

from sft import terminal
from sft.training.progress import TrainingLine

ON_CPU = SimpleNamespace(device=SimpleNamespace(type="cpu"))
LINE = r"step ━+.* 3/4 00:0\d left loss 3\.65 val 4\.65 lr 0\.0014 [\d,]+ tok/s \d\.\d GB"


def train(line, steps=3):
    """The calls that the Trainer makes."""
    state = SimpleNamespace(global_step=0, max_steps=4)
    with line:
        line.on_train_begin(None, state, None)
        for _ in range(2):
            line.on_prediction_step(None, state, None, eval_dataloader=["batch", "batch"])
        line.on_log(None, state, None, logs={"eval_loss": 4.6467})
        for _ in range(steps):
            state.global_step += 1
            line.on_step_end(ON_CPU, state, None)
            line.on_log(None, state, None, logs={"loss": 3.648123, "learning_rate": 0.0014112, "grad_norm": 1.0})
        line.on_log(None, state, None, logs={"train_runtime": 3.0, "train_loss": 3.6})


@pytest.fixture
def screen(monkeypatch):
    """A terminal of 80 columns, as text."""
    text = io.StringIO()
    monkeypatch.setattr(terminal, "Console", partial(Console, file=text, force_terminal=True, width=80))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return text


def drawn(screen):
    """The lines that were drawn, without their colours and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()


def test_in_a_pipe_one_plain_line_a_logging_step(capsys):
    train(TrainingLine(lambda: 1000))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 0: validation loss 4.647"
    said = r"step (\d) of 4  loss 3\.65 val 4\.65 lr 0\.0014 [\d,]+ tok/s \d+\.\d GB  0:00:0\d left"
    assert [re.fullmatch(said, line)[1] for line in lines[1:]] == ["1", "2", "3"]


def test_at_a_terminal_one_live_line_of_at_most_80_columns_that_is_gone_at_the_end(screen):
    train(TrainingLine(lambda: 300))
    lines = drawn(screen)
    assert max(map(len, lines)) <= 80
    assert any(re.match(LINE, line) for line in lines)
    assert screen.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K"), "the cursor is back, and the line is wiped out"
    assert "step 0: validation loss 4.647" in lines


def test_a_validation_has_a_line_of_its_own_with_its_batches(screen):
    train(TrainingLine(lambda: 300))
    lines = [line for line in drawn(screen) if re.match("validating|step ", line)]
    assert {re.search(r"\d/\d", line)[0] for line in lines if line.startswith("validating")} == {"0/2", "1/2", "2/2"}
    assert re.match(r"step .* 3/4", lines[-1]), "the line of training is back"


def test_the_time_left_goes_by_the_mean_of_all_steps_and_not_by_the_last_seconds(screen, monkeypatch):
    now = [0.0]
    line = terminal.live_line()
    line.get_time = lambda: now[0]
    task = line.add_task("step", total=41)
    for seconds in [9, *[1] * 19, 58, *[1] * 5]:  # a slow first step; a validation after the twentieth
        now[0] += seconds
        line.update(task, advance=1)
    assert line.tasks[0].time_remaining == 50  # 15 steps of (25 + 57) / 25 seconds


def test_a_run_that_fails_gives_the_cursor_back(screen):
    with pytest.raises(ZeroDivisionError):
        train(TrainingLine(lambda: 1 // 0))
    assert "\x1b[?25h" in screen.getvalue()


def test_plain_lines_at_a_terminal_for_who_wants_them(screen, capsys):
    train(TrainingLine(lambda: 1000, is_plain=True))
    assert not screen.getvalue()
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_other_processes_draw_nothing(screen, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    train(TrainingLine(lambda: 1000))
    with terminal.bar("answers", 3) as advance:
        advance(2)
    assert not screen.getvalue() and not capsys.readouterr().out


def test_a_bar_shows_how_far_it_is(screen):
    with terminal.bar("answers of base", 30, done=10) as advance:
        advance(5)
    assert any(re.match(r"answers of base ━+.*15/30", line) for line in drawn(screen))
