"""Numbers for people."""

import pytest

from polyfed.report.units import clock, duration, flops, percent, size


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
