"""Numbers for people."""

import pytest

from polyfed.report.units import clock, duration, flops, measured, percent, size, spread


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


def test_metrics_are_percent_or_numbers():
    """Catches an error of thousands in powers of ten, and an AUROC in percent."""
    assert [measured("accuracy", 0.5), measured("auroc", 0.98765), measured("rmse", 12345.6)] == [
        "50.0 %",
        "0.988",
        "12,346",
    ]
    assert (measured("rmse", 3.14159, 2), measured("rmse", None), measured("r2", -0.5)) == ("3.142", "-", "-0.500")
    assert [measured("auroc", value) for value in (0.875, 0.9, 1.0)] == ["0.875", "0.900", "1.000"]
    assert (measured("brier", 0.0625), measured("mae", 0.5), measured("auroc", 0.9, 2)) == ("0.062", "0.5", "0.9000")
    assert spread([1200.0, 1300.0], "mae") == "1,250 ± 71"
    assert spread([0.5, 0.6], "auroc") == "0.550 ± 0.071"
    assert spread([0.5, 0.6]) == "55.0 ± 7.1 %"
