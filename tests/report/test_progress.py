"""Progress and tables, from rows and summaries as the runtime writes them."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from polyfed.config import Config
from polyfed.report.progress import Lines, Live, callback_for, close
from polyfed.report.tables import TRAINING_TIME, closing_table, print_table, remarks, show
from polyfed.report.tables import console as report_console
from polyfed.report.units import clock, duration, flops, percent, size


class Ticks:
    """A clock that tells what it is set to."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


def pipe(width=200):
    return Console(file=io.StringIO(), width=width)


def terminal(width=80):
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)


def written(console):
    return console.file.getvalue()


def row(round_, rounds=10, mean=None, up=0, down=0):
    told = {"round": round_, "rounds": rounds, "totals": {"bytes_up": up, "bytes_down": down}}
    return told if mean is None else {**told, "accuracy": {"mean": mean}}


def summary(mean, worst=0.5, **changes):
    return {
        "accuracy": {"mean": mean, "worst_decile": worst},
        "bytes": {"up": 1_000_000, "down": 2_000_000, "up_values": 1_000_000, "down_values": 2_000_000},
        "flops": 3.5e12,
        "seconds": 65.0,
        "memory": {"process_peak": 512_000_000},
        "run_dir": "/runs/here",
        **changes,
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (size(0), "0 B"),
        (size(999), "999 B"),
        (size(999_600), "1 MB"),
        (size(1_234_567), "1.23 MB"),
        (flops(2.5e12), "2.5 T"),
        (flops(12), "12"),
        (percent(0.8316), "83.2 %"),
        (percent(None), "-"),
        (duration(8.26), "8.3 s"),
        (duration(59.97), "1 min 00 s"),
        (duration(3725), "1 h 02 min"),
        (clock(95), "1:35"),
        (clock(3725), "1:02:05"),
    ],
)
def test_numbers_for_people(text, expected):
    assert text == expected


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


def test_the_table_has_all_that_was_promised_also_in_80_columns():
    for console in (pipe(), terminal(80)):
        closing_table(console, {"fedmrl": summary(0.8312, 0.611), "local-only": summary(0.7)})
        text = written(console)
        for cell in ("83.1 %", "61.1 %", "1 MB", "2 MB", "3.5 T", "1 min 05 s", "512 MB", "fedmrl"):
            assert cell in text, cell
        assert "…" not in text
        assert text.count("fedmrl") == 1  # one table


@pytest.mark.parametrize("width", [60, 40, 20])
def test_a_narrow_terminal_gets_two_tables_and_every_number_whole(width):
    console = terminal(width)
    label = "a-rather-long-name-of-a-control"
    closing_table(console, {"fedmrl": summary(0.8312, 0.611), label: summary(0.7)})
    text = written(console)
    assert re.search(r"^fedmrl +83\.1 % +61\.1 %$", text.replace(" \n", "\n"), re.MULTILINE)
    assert re.search(r"^fedmrl +1 MB +2 MB +3\.5 T +1 min 05 s +512 MB *$", text, re.MULTILINE)
    assert "…" not in text
    assert "training" in text.partition("\n\n")[2]
    if width == 60:
        assert max(map(len, text.splitlines())) <= 60


def test_a_pipe_gets_one_table_however_wide():
    console = Console(file=io.StringIO(), width=report_console().width)
    print_table(console, ["algorithm", *map(str, range(100))], [["a" * 300, *["123 MB"] * 100]], left=["algorithm"])
    text = written(console)
    assert len(text.splitlines()) == 2
    assert text.count("123 MB") == 100


def test_the_time_is_called_what_it_is():
    console = pipe()
    show(console, {"fedmrl": summary(0.8)}, ["local-only is fedmrl share=false."])
    text = written(console)
    assert "training" in text.splitlines()[1]
    assert "Training time is wall clock without evaluation" in text
    assert "\nlocal-only is fedmrl share=false.\n" in text


def test_a_leading_standalone_is_said_plainly():
    said = remarks({"fedmrl": summary(0.81), "standalone": summary(0.8523), "other": summary(0.80)})
    assert "standalone leads fedmrl: 85.23 % against 81.00 % in the mean over clients." in said
    assert not any(text.startswith("other leads") for text in said)


def test_nobody_is_said_to_lead_when_the_main_run_does_or_they_are_equal():
    said = remarks({"fedmrl": summary(0.81), "standalone": summary(0.80), "equal": summary(0.81)})
    assert not any("leads" in text for text in said)


def test_bytes_that_are_not_values_are_told_when_they_matter():
    sent = {"up": 1_000_000, "up_values": 950_000, "up_indices": 30_000, "up_header": 20_000, "down": 0}
    said = remarks({"fiarse": summary(0.8, bytes=sent)})
    assert said == ["fiarse: of the 1 MB up, 950 kB are values, 30 kB indices, 20 kB header.", TRAINING_TIME]
    sent = {**sent, "up_values": 995_000}
    assert remarks({"fiarse": summary(0.8, bytes=sent)}) == [TRAINING_TIME]


def test_the_end_of_a_run_says_where_it_lies():
    console = pipe()
    show(console, {"fedmrl": summary(0.8)})
    assert written(console).endswith("The run lies in /runs/here\n")


def test_simulated_time_and_time_to_accuracy_stand_in_the_table():
    """Catches a column of one run under the target of another, and clients lost in silence."""
    wasted = {"bytes_up": 1_000_000, "bytes_down": 2_000_000, "flops": 3e9}
    clock = {"seconds": 3725.0, "void": 2, "failed": {"late": 3, "absent": 0}, "wasted": wasted}
    reached = {"accuracy": 0.6, "simulated_seconds": 95.0}
    first = {**summary(0.8), "simulated": clock, "targets": [reached, None]}
    second = {**summary(0.7), "simulated": {**clock, "failed": {"late": 0}}, "targets": [None, None]}
    console = pipe()
    show(console, {"fedmrl": first, "local-only": second})
    text = written(console)
    assert re.search(r"^fedmrl .*1 h 02 min +1 min 35 s *$", text, re.MULTILINE)
    assert re.search(r"^local-only .*1 h 02 min +- *$", text, re.MULTILINE)
    assert "60.0 %" in text
    assert "fedmrl: clients asked in vain: 3 late; 2 rounds were void; that cost 1 MB up, 2 MB down, 3 G FLOPs" in text
    assert "local-only: clients" not in text
    assert "Simulated time" in text
    assert "imulated" not in written_of({"fedmrl": summary(0.8)})


def written_of(summaries):
    console = pipe()
    show(console, summaries)
    return written(console)
