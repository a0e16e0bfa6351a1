"""Tables of devices: their speed, bandwidth and memory, and the hours at which they are available.

docs/clocks.md defines the columns and names the sources of the tables that come with polyfed.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from math import inf, isfinite
from pathlib import Path

from polyfed.base.errors import ConfigError
from polyfed.base.text import csv_text, hint

#: The tables that come with polyfed, in defaults/devices.
TABLES: Mapping[str, str] = {
    "cross-device": "phones, laptops and small boards of people, most of them available at night",
    "cross-silo": "workstations and servers of organisations, available at office hours or always",
}

_HOURS = tuple(f"h{hour:02d}" for hour in range(24))
_RATES = ("compute_gflops", "memory_mb", "down_mbps", "up_mbps")
_COLUMNS = ("device", *_RATES, "share", *_HOURS)
_KNOWN = f"device, {', '.join(_RATES)}, and optionally share and h00 to h23"


@dataclass(frozen=True)
class Profile:
    """One row of a table.

    Args:
        device: its name.
        compute_gflops: 10^9 floating-point operations per second that it sustains in training, by polyfed's count.
        memory_mb: 10^6 bytes that training may take.
        down_mbps: 10^6 bits per second from the server.
        up_mbps: 10^6 bits per second to the server.
        share: share of the clients, relative to the other rows.
        hours: the fraction of such devices that are available in each of the 24 hours of the day.
    """

    device: str
    compute_gflops: float
    memory_mb: float
    down_mbps: float
    up_mbps: float
    share: float = 1.0
    hours: tuple[float, ...] = (1.0,) * 24

    def seconds(self, down: int, flops: float, up: int) -> tuple[float, float, float]:
        """Return the seconds to receive ``down`` bytes, to compute ``flops``, and to send ``up`` bytes."""
        return 8e-6 * down / self.down_mbps, 1e-9 * flops / self.compute_gflops, 8e-6 * up / self.up_mbps


def load_profiles(table: str) -> tuple[Profile, ...]:
    """Return the rows of a table that comes with polyfed, or of a .csv file.

    Raises:
        ConfigError: all faults at once, each with its line.
    """
    profiles, faults = read_profiles(table)
    if faults:
        raise ConfigError(*(f"devices.profiles: {text}" for text in faults))
    return profiles


def read_profiles(table: str) -> tuple[tuple[Profile, ...], list[str]]:
    """Return the valid rows of a table, and the faults of the others."""
    path = Path(str(files("polyfed") / "defaults" / "devices" / f"{table}.csv")) if table in TABLES else Path(table)
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.reader(handle, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except FileNotFoundError:
        return (), [f"{path}: no such file; expected a .csv table of devices, or one of {', '.join(TABLES)}"]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        return (), [f"{path}: cannot be read as csv in UTF-8 ({error}); correct or convert the file"]
    lines = [(number, cells) for number, cells in lines if any(cells) and not cells[0].startswith("#")]
    if not lines:
        return (), [f"{path}: no rows; expected a header and one line per device"]
    head = lines[0][1]
    faults = list(_head_faults(head))
    if faults:
        return (), [f"{path}, line {lines[0][0]}: {text}" for text in faults]
    good: list[Profile] = []
    for number, cells in lines[1:]:
        profile, found = _row(head, cells)
        faults += [f"{path}, line {number}: {text}" for text in found]
        if profile is not None and profile.device in {other.device for other in good}:
            faults.append(f"{path}, line {number}: device {profile.device!r} is named twice; choose another name")
        elif profile is not None:
            good.append(profile)
    if not faults and not good:
        faults.append(f"{path}: no devices below the header; expected at least one line")
    if not faults and not any(profile.share for profile in good):
        faults.append(f"{path}: every share is 0; expected at least one device with clients")
    return tuple(good), faults


def to_csv(profiles: Sequence[Profile]) -> str:
    """Return the text of a table; `read_profiles` reads it back."""
    names = ("device", *_RATES, "share")
    return csv_text(_COLUMNS, ([*(getattr(profile, name) for name in names), *profile.hours] for profile in profiles))


def _head_faults(head: list[str]) -> Iterator[str]:
    yield from (
        f"unknown column {name!r}{hint(name, _COLUMNS)} known: {_KNOWN}" for name in head if name not in _COLUMNS
    )
    yield from (f"got column {name!r} twice; expected it once" for name in dict.fromkeys(head) if head.count(name) > 1)
    absent = [name for name in ("device", *_RATES) if name not in head]
    if absent:
        yield f"missing column {', '.join(absent)}; expected {_KNOWN}"
    hours = [name for name in _HOURS if name in head]
    if 0 < len(hours) < len(_HOURS):
        left = [name for name in _HOURS if name not in hours]
        yield f"missing column {', '.join(left)}; expected all of h00 to h23, or none (always available)"


def _row(head: list[str], cells: list[str]) -> tuple[Profile | None, list[str]]:
    if len(cells) != len(head):
        return None, [f"got {len(cells)} cells; expected {len(head)} as in the header"]
    row = dict(zip(head, cells, strict=True))
    faults: list[str] = []

    def number(name: str, fits: Callable[[float], bool], expected: str) -> float:
        try:
            value = float(row[name])
        except ValueError:
            value = inf
        if not (isfinite(value) and fits(value)):
            faults.append(f"{name}: got {row[name]!r}; expected {expected}")
        return value

    if not row["device"]:
        faults.append("device: got ''; expected a name")
    rates = [number(name, lambda x: x > 0, "a number above 0") for name in _RATES]
    share = number("share", lambda x: x >= 0, "a number of at least 0") if "share" in row else 1.0
    hours = [number(name, lambda x: 0 <= x <= 1, "a fraction from 0 to 1") for name in _HOURS if name in row]
    if faults:
        return None, faults
    return Profile(
        row["device"], **dict(zip(_RATES, rates, strict=True)), share=share, hours=tuple(hours) or (1.0,) * 24
    ), []
