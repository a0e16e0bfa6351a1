"""The keys that choose a round: every fault is named, with what is expected."""

import pytest
from faults import only, refused

from polyfed.config import Config

VALID = "[data]\nvalidation_fraction = 0.2\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            '[run]\nkeep = "best"',
            ('run.keep: got "best" without data.validation_fraction', "test rows choose no round"),
        ),
        ("[run]\npatience = 3", ("run.patience: got 3 without data.validation_fraction", "such as 0.2")),
        ("[run]\npatience = 0\n" + VALID, ("run.patience: got 0", "more than 0")),
        ('[run]\nkeep = "first"', ("run.keep: got 'first'", "'last' or 'best'")),
        ('[run]\nkeep = "best"\nrounds = 25\n' + VALID, ("run.rounds: got 25 with run.eval_every = 10", "a multiple")),
        (
            '[run]\nmonitor = "accuracy"',
            ("run.monitor: got 'accuracy'", 'belongs to run.keep = "best" or run.patience'),
        ),
        ('[run]\nkeep = "best"\nmin_delta = 0.1\n' + VALID, ("run.min_delta: got 0.1", "belongs to run.patience")),
        ("[run]\npatience = 1\nmin_delta = -0.1\n" + VALID, ("run.min_delta: got -0.1",)),
        ('[run]\nkeep = "best"\nmonitor = "auc"\n' + VALID, ("run.monitor: unknown metric 'auc'", "known: accuracy")),
        (
            '[run]\nkeep = "best"\nmonitor = "auroc"\n' + VALID,
            ("run.monitor: got 'auroc'", "measures accuracy", "add 'auroc' to run.metrics"),
        ),
        ('[run]\nkeep = "best"\nmonitor = "rmse"\n' + VALID, ("a classification has no 'rmse'",)),
    ],
)
def test_one_fault(text, parts, tmp_path):
    only(refused(text, tmp_path), "a.toml: ", *parts)


def test_the_metric_is_the_headline_unless_it_is_named():
    run = {"keep": "best", "metrics": ["auroc", "brier"]}
    data = {"validation_fraction": 0.2}
    assert Config.parse({"run": run, "data": data}).monitor == "auroc"
    assert Config.parse({"run": {**run, "monitor": "brier"}, "data": data}).monitor == "brier"
    assert Config.parse({"run": {**run, "monitor": "accuracy"}, "data": data}).monitor == "accuracy"


def test_new_keys_change_no_hash_of_an_old_configuration():
    """Catches runs of before that are run again because a key was added, and other runs that count as the same."""
    data = {"validation_fraction": 0.2}
    plain, named = (Config.parse({"run": keys, "data": data}).hash() for keys in ({}, {"keep": "last"}))
    assert plain == named
    others = [{"keep": "best"}, {"patience": 2}, {"patience": 3}, {"patience": 3, "min_delta": 0.5}]
    assert len({plain, *(Config.parse({"run": keys, "data": data}).hash() for keys in others)}) == 5
