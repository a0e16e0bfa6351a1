"""Numbers as text for readers: percent, bytes, FLOPs, durations."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from polyfed.metrics.catalogue import METRICS


def percent(fraction: float | None, digits: int = 1) -> str:
    """0.8312 -> "83.1 %"; None, for a value that was not measured, -> "-"."""
    return "-" if fraction is None else f"{100 * fraction:.{digits}f} %"


def measured(metric: str, value: float | None, digits: int = 1) -> str:
    """Return a metric as text; None, for a value that is not defined, is "-".

    A share is in percent with ``digits`` decimals; what has no unit, such as an AUROC, has two decimals more; what is
    in the unit of the data has so many significant digits.
    """
    if value is None or METRICS[metric].percent:
        return percent(value, digits)
    return _number(value, digits + 2, METRICS[metric].unit)


def _number(value: float, digits: int, significant: bool) -> str:
    """12345.6 -> "12,346"; 3 digits: 0.1 -> "0.100", or if significant -> "0.1"."""
    if 1000 <= abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if significant or abs(value) >= 1e12 else f"{value:.{digits}f}"


def heading(metric: str) -> str:
    """Return the name of a metric as the heading of a narrow column, a word a line."""
    return metric.replace("_", "\n")


def size(count: float) -> str:
    """Bytes as text, in powers of 1000: 1234567 -> "1.23 MB"."""
    return _scaled(count, "B")


def flops(count: float | None) -> str:
    """Floating-point operations as text: 1.2e12 -> "1.2 T"; None, where they cannot be counted, -> "unknown"."""
    return "unknown" if count is None else _scaled(count, "")


def _scaled(count: float, unit: str) -> str:
    if count < 1000:
        return f"{count:.0f} {unit}".rstrip()
    power = 1 + sum(count >= 999.5 * 1000**lower for lower in range(1, 6))  # 999.6 kB is 1 MB, not 1e+03 kB
    return f"{count / 1000**power:.3g} {' kMGTPE'[power]}{unit}"


def duration(seconds: float | None) -> str:
    """Seconds as text: 3725 -> "1 h 02 min"; 95 -> "1 min 35 s"; 8.25 -> "8.2 s"; None -> "-"."""
    if seconds is None:
        return "-"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def clock(seconds: float) -> str:
    """Seconds as short text: 3725 -> "1:02:05"; 95 -> "1:35"."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


def spread(values: Iterable[float], metric: str = "accuracy") -> str:
    """Mean and standard deviation (n - 1): ``71.6 ± 1.3 %``, of an AUROC ``0.716 ± 0.013``; of one value the value."""
    found = list(values)
    return spread_text(metric, statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None)


def spread_text(metric: str, mean: float, deviation: float | None) -> str:
    """Return a mean and its standard deviation, if there is one, as text; see `spread`."""
    if deviation is None:
        return measured(metric, mean)
    if METRICS[metric].percent:
        return f"{100 * mean:.1f} ± {100 * deviation:.1f} %"
    unit = METRICS[metric].unit
    return f"{_number(mean, 3, unit)} ± {_number(deviation, 2 if unit else 3, unit)}"
