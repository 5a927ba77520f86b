"""Comparisons in words, for reports: how large a difference is, whether it can be told from none, and if not,
what could. Plain numbers in, one sentence out; called where tables are printed and exported.

No number is rounded into saying something else: a p just under .05 is not shown as .05, a bound just over 0 not as
0, and no number of items is rounded down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ALPHA = 0.05
NOTHING = 1e-9  # a difference under this is a float's
POWER_WORDS = "with 80% power"
ALONE = " for one test alone"
_MOST_DIGITS = 6


@dataclass(frozen=True)
class Compared:
    """`first` against `second` on one metric of one task, on the same n items.

    value, other, difference (value - other), low, high (its 95% interval, None where there is none), least: on the
    scale they are shown in (percents 0 to 100, perplexity as it is). p: of the paired test, None when nothing was
    tested; p_holm: adjusted for the other comparisons made with it (None: there were none). discordant: items that
    only one of the two got, which also says that the test is exact McNemar (None: paired randomisation). needed:
    items for 80% power at the observed difference (None: none would do, or beyond what is given). least: the
    smallest difference the test would have called significant. Both are of this test alone, without Holm.
    unit: the word after a difference ("points", "nats", "").
    """

    first: str
    second: str
    task: str
    metric: str
    value: float
    other: float
    difference: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    n: int
    discordant: int | None
    needed: int | None
    least: float | None
    unit: str = "points"
    digits: int = 1


def comparison(row: Compared) -> str:
    """One sentence without a final stop; "-" is ASCII."""
    unit = f" {row.unit}" if row.unit else ""
    sizes = f"{number(row.value, row.digits)} against {number(row.other, row.digits)}"
    change = f"difference {signed(row.difference, row.digits)}{unit}{_interval(row)}"
    start = f"{row.first} against {row.second} on {row.task} ({row.metric}): {sizes}, {change}"
    if row.p is None or not math.isfinite(row.p):
        return f"{start}, not tested (n = {row.n:,})"
    test = f"at n = {row.n:,} ({_test(row)})"
    if abs(row.difference) < NOTHING:
        return f"{start}, not distinguishable {test}; no difference at all was observed{_least(row, unit)}"
    deciding = row.p if row.p_holm is None else row.p_holm
    if deciding < ALPHA:
        return f"{start}, {'higher' if row.difference > 0 else 'lower'} than {row.second} {test}"
    if row.p < ALPHA:
        return f"{start}, not distinguishable {test}: significant alone, not among the comparisons made"
    return f"{start}, not distinguishable {test}{_least(row, unit)}{_needed(row)}"


def _interval(row: Compared) -> str:
    if row.low is None or row.high is None or not (math.isfinite(row.low) and math.isfinite(row.high)):
        return ""
    return f" [{signed(row.low, row.digits)}, {signed(row.high, row.digits)}]"


def _test(row: Compared) -> str:
    words = "paired randomisation" if row.discordant is None else "exact McNemar"
    words += f" {probability(row.p or 0.0)}"
    if row.p_holm is not None:
        words += f", Holm {probability(row.p_holm).removeprefix('p ').removeprefix('= ')}"
    return words + (f"; {row.discordant:,} discordant" if row.discordant is not None else "")


def _least(row: Compared, unit: str) -> str:
    if row.least is None:
        return ""
    step = 10**row.digits
    least = math.ceil(row.least * step - 1e-9) / step  # never less than would do
    return f"; {number(least, row.digits)}{unit} would have been enough{_alone(row)}"


def _needed(row: Compared) -> str:
    if row.needed is None:
        return "; more than 10 million items would be needed to see it" if row.n > 1 else ""
    if row.needed <= row.n:
        return ""
    return f"; about {rounded_up(row.needed):,} items would be needed to see it {POWER_WORDS}{_alone(row)}"


def _alone(row: Compared) -> str:
    """Beside other comparisons Holm asks for more than the sizes given, which are of a single test."""
    return "" if row.p_holm is None else ALONE


def probability(p: float, alpha: float = ALPHA) -> str:
    """`p = .12`, `p = .004`, `p < .001`, `p > .99`, `p = 1`: two digits, more where two would hide which side of
    alpha it is on, or leave less than one figure."""
    if p < 0.001:
        return "p < .001"
    if p >= 1:
        return "p = 1"
    if p > 0.99:
        return "p > .99"
    digits = 2 if p >= 0.01 else 3
    while digits < _MOST_DIGITS and (round(p, digits) < alpha) != (p < alpha):
        digits += 1
    return f"p = {p:.{digits}f}".replace("0.", ".", 1)


def number(value: float, digits: int = 1) -> str:
    """With thousands separators; more digits where those asked for would show 0 for what is not."""
    if abs(value) < NOTHING:
        return f"{0:.{digits}f}"
    while digits < _MOST_DIGITS and not float(f"{value:.{digits}f}"):
        digits += 1
    return f"{value:,.{digits}f}" if float(f"{value:.{digits}f}") else f"{value:.1g}"


def signed(value: float, digits: int = 1) -> str:
    """`number` with its sign; 0 has none."""
    text = number(value, digits)
    return f"+{text}" if value > 0 and float(text.replace(",", "")) else text


def rounded_up(items: int) -> int:
    """To two figures, never down: 4,812 is 4,900."""
    if items < 100:
        return items
    step = 10 ** (len(str(items)) - 2)
    return -(-items // step) * step
