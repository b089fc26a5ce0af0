"""Numbers as people read them: counts, sizes, durations and energy, in log lines and on pages."""

from typing import Any, TypeGuard

MISSING = "\N{EN DASH}"
NARROW = "\N{NARROW NO-BREAK SPACE}"


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def cell(value: float) -> str:
    """Format a number for a table in a terminal: all digits of a count, four of others."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def counted(number: int, noun: str, nouns: str | None = None) -> str:
    """Format a count with its noun: `1 prompt`, `1,200 prompts`; `nouns` if it takes no s."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def duration(seconds: float) -> str:
    """Format seconds for a log line: `45s`, `12m30s`, `3h05m`, `2d03h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"


def short_number(number: float) -> str:
    """Format a count for a log line, in three digits: `812`, `35.2k`, `1.24B`."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= scale:
            return f"{number / scale:.3g}{suffix}"
    return f"{number:.3g}"


def byte_size(count: float) -> str:
    """Format bytes for a log line: `512 B`, `1.2 MB`."""
    from rich.filesize import decimal

    return decimal(round(count)).replace(" bytes", " B")


def compact(number: float) -> str:
    """Format a number for a page, in four digits or so: `1.25M`, `0.0123`, `6e-05`."""
    if number == 0:
        return "0"
    magnitude = abs(number)
    if magnitude >= 10_000:
        return scaled(number, 1000, ("", "k", "M", "B", "T"), gap="")
    if magnitude >= 1:
        return f"{number:.4g}"
    return f"{number:.3g}" if magnitude >= 1e-3 else f"{number:.2g}"


def scaled(number: float, base: int, units: tuple[str, ...], gap: str = NARROW) -> str:
    """Format a number for a page in the largest unit that it fills, in three digits."""
    place, left = 0, float(number)
    while abs(left) >= base * 0.9995 and place < len(units) - 1:
        left, place = left / base, place + 1
    return f"{left:.3g}{gap if units[place] else ''}{units[place]}"


def seconds(number: float) -> str:
    """Format seconds for a page: `0.42 s`, `3.4 s`, `2 min 05 s`, `3 h 20 min`."""
    if number < 60:
        return f"{number:.2g}{NARROW}s" if number < 10 else f"{number:.0f}{NARROW}s"
    if number < 3600:
        return f"{int(number) // 60}{NARROW}min {int(number) % 60:02d}{NARROW}s"
    if number < 172_800:
        return f"{int(number) // 3600}{NARROW}h {int(number) % 3600 // 60:02d}{NARROW}min"
    return f"{number / 86_400:.1f}{NARROW}days"


def energy(kwh: float) -> str:
    """Format kilowatt-hours for a page in a unit that fits: `350 mWh`, `4.2 Wh`, `12.5 kWh`."""
    return scaled(kwh * 1e6, 1000, ("mWh", "Wh", "kWh", "MWh"))
