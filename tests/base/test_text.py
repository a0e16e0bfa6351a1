"""Nearest known words."""

from polyfed.base.text import nearest


def test_capitals_do_not_count_and_a_beginning_is_enough():
    assert nearest("AGE", ["Age", "sex"]) == "; did you mean 'Age'?"
    assert nearest("acc", ["auroc", "accuracy"]) == "; did you mean 'accuracy'?"
    assert nearest("ac", ["accuracy"]) == ""
    assert nearest("xyz", ["accuracy"]) == ""
