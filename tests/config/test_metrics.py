"""Metrics, targets, tasks and names in a configuration: every fault is named, with what is expected."""

import pytest
from faults import only, refused

from polyfed.config import Config

REGRESSION = '[data]\ndataset = "npz"\npath = "x.npz"\ntask = "regression"\n[partition]\nkind = "iid"\n'
FEDAVG = '[algorithm]\nname = "fedavg"\n'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('[run]\nmetrics = ["auroc", "auc"]', ("run.metrics[1]: unknown metric 'auc'", "known: accuracy")),
        ('[run]\nmetrics = ["ECE"]', ("run.metrics[0]: unknown metric 'ECE'; did you mean 'ece'?",)),
        ('[run]\nmetrics = ["acc"]', ("run.metrics[0]: unknown metric 'acc'; did you mean 'accuracy'?",)),
        ("[run]\nmetrics = []", ("run.metrics: got []", "at least one")),
        ('[run]\nmetrics = ["ece", "ece"]', ("run.metrics: got ['ece', 'ece']", "different names")),
        ('[run]\nmetrics = ["rmse"]', ("run.metrics[0]: got 'rmse'", "a classification has the metrics accuracy")),
        ('[run]\ntargets = ["auroc=0.9"]', ("run.targets[0]", "measures accuracy", "add 'auroc' to run.metrics")),
        ('[run]\ntargets = ["rmse=3"]', ("run.targets[0]", "a classification has no 'rmse'")),
        ('[run]\ntargets = ["auroc"]', ("run.targets[0]", "a metric and a number", "auroc=0.9")),
        ('[run]\nmetrics = ["auroc"]\ntargets = ["auroc=90"]', ("run.targets[0]", "lies between 0 and 1")),
        ("[run]\ntargets = [true]", ("run.targets[0]: got true",)),
        ('[clients]\ncount = 3\nnames = ["a", "b"]', ("clients.names: got 2 names", "expected 3")),
        ('[clients]\ncount = 2\nnames = ["a", "a"]', ("clients.names: got 'a' twice",)),
        ('[clients]\ncount = 1\nnames = [""]', ("clients.names[0]", "not empty")),
        ('[data]\ntask = "regression"\n[partition]\nkind = "iid"\n' + FEDAVG, ("data.task", "'digits' are classes")),
        ('[data]\ntask = "ranking"', ("data.task: got 'ranking'", "'classification' or 'regression'")),
        ("[data]\ntarget_scale = 2.0", ("data.target_scale", 'task = "regression"')),
        ("[data]\ntarget_offset = 2.0", ("data.target_offset", 'task = "regression"')),
        (REGRESSION + "[run]\ntargets = [0.5]\n" + FEDAVG, ("run.targets[0]: got 0.5", "measures rmse, mae, r2")),
        (REGRESSION + '[run]\nmetrics = ["auroc"]\n' + FEDAVG, ("run.metrics[0]", "has the metrics rmse, mae, r2")),
        (REGRESSION.replace("iid", "dirichlet") + FEDAVG, ("partition.kind: got 'dirichlet'", "'iid' or 'natural'")),
        (REGRESSION + '[algorithm]\nname = "fedgh"', ("algorithm.name: fedgh cannot train", "fedavg", "standalone")),
        (REGRESSION + FEDAVG + '[controls.x]\nname = "fd"', ("controls.x.name: fd cannot train", "fedavg")),
        (
            '[run]\nmetrics = ["auroc", "ece"]\n[algorithm]\nname = "fedmrl-ssl"',
            ("run.metrics: got 'ece'", "fedmrl-ssl are"),
        ),
        (REGRESSION.replace("task", "target_scale = 0.0\ntask") + FEDAVG, ("data.target_scale", "more than 0")),
    ],
)
def test_one_fault(text, parts, tmp_path):
    only(refused(text, tmp_path), "a.toml: ", *parts)


def test_all_faults_come_at_once(tmp_path):
    text = '[run]\nmetrics = ["rmse"]\ntargets = ["auroc=2"]\n[clients]\nnames = ["a"]\n'
    assert len(refused(text, tmp_path)) == 3


def test_what_is_asked_for_is_written_and_read_back():
    given = {"metrics": ["auroc", "accuracy"], "targets": [0.5, "auroc=0.9"], "predictions": True}
    config = Config.parse({"run": given, "clients": {"count": 2, "names": ["Ulm", "Bonn"]}})
    assert config.metrics == ("auroc", "accuracy")
    assert Config.parse(config.to_dict()) == config
    assert config.to_dict()["run"]["targets"] == (0.5, "auroc=0.9")
    assert Config().metrics == ("accuracy",)
    assert "metrics" not in Config().to_dict()["run"]


def test_new_keys_change_no_hash_of_an_old_configuration():
    """Catches runs of before that are run again because a key was added."""
    plain = Config.parse({"run": {"targets": [0.5]}})
    assert plain.hash() == Config.parse({"run": {"targets": [0.5], "predictions": False}}).hash()
    assert plain.hash() != Config.parse({"run": {"targets": [0.5], "metrics": ["auroc"]}}).hash()
