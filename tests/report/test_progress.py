"""Progress, from rows as the runtime writes them."""

from pathlib import Path

from consoles import pipe, summary, terminal, written

from polyfed.config import Config
from polyfed.report.progress import Lines, Live, callback_for, close
from polyfed.report.tables import show


class Ticks:
    """A clock that tells what it is set to."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


def row(round_, rounds=10, mean=None, up=0, down=0):
    told = {"round": round_, "rounds": rounds, "totals": {"bytes_up": up, "bytes_down": down}}
    return told if mean is None else {**told, "accuracy": {"mean": mean}}


def test_plain_lines_tell_round_accuracy_bytes_seconds_and_eta():
    console, now = pipe(), Ticks()
    lines = Lines(console, "fedmrl", now)
    lines.started(Path("/runs/[a]"), Config(run={"rounds": 10}), 1)
    now.time += 8
    lines.round_ended(row(4, mean=0.5, up=1_000_000, down=2_000_000))
    told = written(console).splitlines()
    assert told[0] == "fedmrl: 10 rounds, in /runs/[a]"
    assert told[1] == "fedmrl: round  4/10  accuracy 50.0 %  3 MB up and down  8.0 s  ETA 12.0 s"
    assert "\x1b" not in written(console)


def test_eta_of_a_resumed_run_counts_the_rounds_of_this_process():
    console, now = pipe(), Ticks()
    lines = Lines(console, "a", now)
    lines.started(Path("r"), Config(run={"rounds": 10}), 7)
    now.time += 4
    lines.round_ended(row(8, mean=0.5))
    assert "from round 7" in written(console)
    assert "ETA 4.0 s" in written(console)


def test_a_long_run_prints_about_twenty_lines_and_always_the_last_round():
    console = pipe()
    lines = Lines(console, "a")
    lines.started(Path("r"), Config(run={"rounds": 1001}), 1)
    for round_ in range(1002):
        lines.round_ended(row(round_, 1001, mean=0.5))
    told = written(console).splitlines()
    assert 18 <= len(told) <= 23
    assert "round 1001/1001" in told[-1]
    assert "ETA" not in told[-1]


def test_rounds_that_were_not_evaluated_print_nothing():
    console = pipe()
    Lines(console, "a").round_ended(row(3))
    assert written(console) == ""


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines():
    assert isinstance(callback_for(terminal())("a"), Live)
    assert isinstance(callback_for(pipe())("a"), Lines)


def test_the_bar_shows_round_accuracy_bytes_time_and_eta_within_80_columns():
    console, now = terminal(80), Ticks()
    live = Live(console, "control 1/2 a-rather-long-name-of-a-control", now)
    live.started(Path("r"), Config(run={"rounds": 10}), 1)
    now.time += 90
    live.round_ended(row(5, mean=0.614, up=10**8))
    live.ended({})
    text = written(console)
    assert "5/10" in text
    assert "accuracy 61.4 %  100 MB  1:30  ETA 1:30" in text
    assert "control 1/2" in text


def test_the_terminal_is_given_back_after_an_error():
    console = terminal()
    live = Live(console, "a")
    live.started(Path("r"), Config(), 1)
    assert not written(console).endswith("\x1b[?25h")
    close(live)
    assert written(console).rstrip().endswith("\x1b[?25h")  # the cursor is visible again


def test_the_end_of_a_run_says_where_it_lies():
    console = pipe()
    show(console, {"fedmrl": summary(0.8)})
    assert written(console).endswith("The run lies in /runs/here\n")
