"""The closing table and its remarks, from summaries as the runtime writes them."""

import io
import json
import re
from pathlib import Path

import pytest
from consoles import pipe, summary, terminal, written
from rich.console import Console

from polyfed.report.consoles import console as report_console
from polyfed.report.tables import TRAINING_TIME, closing_table, print_table, remarks, show


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
    assert "fedmrl: clients asked in vain: 3 late; 2 rounds were void; they cost 1 MB up, 2 MB down, 3 G FLOPs" in text
    assert "local-only: clients" not in text
    assert "Simulated time" in text
    assert "imulated" not in written_of({"fedmrl": summary(0.8)})


def written_of(summaries):
    console = pipe()
    show(console, summaries)
    return written(console)


def _chosen(folder: Path) -> dict[str, object]:
    selection = {
        "metric": "auroc",
        "kept": "best",
        "stopped": {"round": 6, "reason": "auroc on validation rows did not improve in 2 evaluations"},
        "best": {"round": 4, "validation": {"auroc": 0.75, "accuracy": 0.5}, "test": {"auroc": 0.5, "accuracy": 0.25}},
        "last": {"round": 6, "validation": {"auroc": 0.625, "accuracy": 0.5}, "test": None},
    }
    rows = [
        {"kept": kept, "round": round_, "client": 0, "model": "cnn5", "examples": 8, "accuracy": accuracy}
        for kept, round_, accuracy in (("best", 4, 0.25), ("last", 6, 0.875))
    ]
    (folder / "tests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "clients.jsonl").write_text(json.dumps({**rows[0], "round": 9, "accuracy": 0.9375}) + "\n")
    return {**summary(0.25, 0.25), "rounds": 9, "run_dir": str(folder), "selection": selection}


def test_the_choice_of_a_round_stands_in_a_table_of_its_own(tmp_path: Path) -> None:
    """Catches validation values that pass for results, a model that is left out, and an early end without a reason."""
    text = written_of({"fedmrl": _chosen(tmp_path)})
    rows = [
        line.split() for line in text.splitlines() if line.startswith("fedmrl ") and ("best" in line or "last" in line)
    ]
    assert rows[0] == ["fedmrl", "best", "4", "0.750", "0.500", "50.0", "%", "25.0", "%"]
    assert rows[1] == ["fedmrl", "last", "6", "0.625", "-", "50.0", "%", "-"]
    assert "fedmrl ended at round 6 of 9: auroc on validation rows did not improve in 2 evaluations." in text
    assert "test rows chose nothing" in text
    assert "test rows chose nothing" not in written_of({"fedmrl": summary(0.25, 0.25)})


def test_the_table_of_clients_is_of_the_kept_model(tmp_path: Path) -> None:
    """Catches clients' results of validation rows, or of the last round, under a headline of the best one."""
    text = written_of({"fedmrl": _chosen(tmp_path)})
    assert re.search(r"^0 +cnn5 +8 +25.0 %", text, re.MULTILINE)
    assert "87.5 %" not in text
    assert "93.8 %" not in text


def test_the_costs_of_each_capacity_stand_in_a_table(tmp_path: Path) -> None:
    """Catches sums in place of means, and clients that were tested and did not train."""
    trained = [("0.25", 0, 1, 10), ("0.25", 0, 2, 20), ("0.25", 2, 1, 30), ("1", 1, 1, 400)]
    rows: list[dict[str, object]] = [
        {"round": n, "client": k, "capacity": float(of), "bytes_up": b, "bytes_down": 2 * b, "flops": 3 * b}
        for of, k, n, b in trained
    ]
    rows.append({"round": 2, "client": 4, "model": "mlp", "capacity": 0.25, "examples": 8, "accuracy": 0.5})
    (tmp_path / "clients.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {**summary(0.5), "run_dir": str(tmp_path), "rounds": 2}
    run["accuracy"]["by_capacity"] = {"1": 0.75, "0.25": 0.5}
    text = written_of({"heterofl": run})
    assert re.search(r"^ *0.25 +2 +50.0 % +20 B +40 B +60$", text, re.MULTILINE)
    assert re.search(r"^ *1 +1 +75.0 % +400 B +800 B +1.2 k$", text, re.MULTILINE)
    run["accuracy"]["by_capacity"] = {"1": 0.75}
    assert "capacity" not in written_of({"heterofl": run})


def test_the_class_is_named_whose_metrics_stand_in_the_table():
    """Catches the metrics of a class that nobody named, and a remark where no class is meant."""
    two = {"mean": 0.5, "clients": 3, "pooled_by_class": {"ill": 0.1, "well": 0.9}}
    several = {**two, "pooled_by_class": {"a": 0.1, "b": 0.2, "c": 0.3}}
    plain = {"mean": 0.5, "clients": 3}

    def named(**metrics):
        return [text for text in remarks({"fedavg": summary(0.8, metrics=metrics)}) if "of class" in text]

    order = "of class 'well', the second of (ill, well); data.options.classes sets the order."
    assert named(auroc=two, specificity=two, auprc=two) == [f"specificity, auprc: {order}"]
    assert named(brier=plain, sensitivity=two) == [f"sensitivity: {order}"]
    assert named(auroc=two) == named(sensitivity=several, auprc=several) == named(brier=plain) == []


def test_clients_that_were_away_are_named_under_the_table():
    """Catches a mean over two of three hospitals that looks like one over three."""

    def said(begin, end):
        deployed = {"missing": {"begin": begin, "end": end}}
        return [text for text in remarks({"fedavg": {**summary(0.8), "deployed": deployed}}) if "connected" in text]

    assert said([], []) == []
    assert said([1], []) == ["Not connected: client 1 when the run began."]
    assert said([1, 2], [2]) == ["Not connected: clients 1, 2 when the run began; client 2 when the run ended."]


def test_every_metric_has_its_pooled_value_in_the_table_where_there_is_one():
    """Catches a mean over small clients without the value of all rows, and a column that nothing fills."""
    block = {"mean": 0.8, "worst_decile": 0.7, "clients": 3, "pooled": 0.75}
    metrics = {"accuracy": block, "ece": {**block, "mean": 0.31, "pooled": 0.042}, "brier": {**block, "pooled": None}}
    majority = {name: {"mean": 0.5, "worst_decile": 0.4} for name in metrics}
    console = pipe()
    closing_table(console, {"fedavg": summary(0.8, metrics=metrics, majority=majority)})
    head, below, row, counted = written(console).splitlines()[-4:]
    assert row.split()[:10] == ["fedavg", "80.0", "%", "70.0", "%", "75.0", "%", "31.0", "%", "4.2"]
    assert row.split()[11] == "0.800"
    assert counted.split()[:9] == ["majority", "class", "50.0", "%", "40.0", "%", "-", "50.0", "%"]
    assert (head + below).count("pooled") == 2


def test_the_closing_lines_say_how_to_draw_the_run():
    console = pipe()
    show(console, {"fedavg": summary(0.8)})
    assert written(console).splitlines()[-2:] == [
        "To draw its curves: polyfed plot /runs/here",
        "The run lies in /runs/here",
    ]
