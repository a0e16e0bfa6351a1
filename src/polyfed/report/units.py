"""Numbers as text for readers: percent, bytes, FLOPs, durations."""

from __future__ import annotations

import statistics
from collections.abc import Iterable


def percent(fraction: float | None, digits: int = 1) -> str:
    """0.8312 -> "83.1 %"; None, for a value that was not measured, -> "-"."""
    return "-" if fraction is None else f"{100 * fraction:.{digits}f} %"


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


def spread(fractions: Iterable[float]) -> str:
    """Mean and standard deviation (n - 1) of fractions: ``71.6 ± 1.3 %``; for a single fraction ``71.6 %``."""
    found = list(fractions)
    if len(found) < 2:
        return percent(statistics.fmean(found))
    return f"{100 * statistics.fmean(found):.1f} ± {100 * statistics.stdev(found):.1f} %"
