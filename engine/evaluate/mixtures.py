"""The `weights:` of a config: mixtures written out, named by a word, or spread over a grid or a line.

    [{pt: 0.3, sft: 0.7}, base, sft]                      # base: no adapter; a label: that adapter alone at 1
    {grid: {pt: [0, 0.3, 1], sft: [0, 0.7, 1]}}           # every pair; the first adapter changes slowest
    {line: {pt: {from: 0, to: 1, step: 0.1}, sft: rest}}  # side by side; rest: 1 minus the others

Called by engine/evaluate/config.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from engine.evaluate.values import Checker, kind_of, nearest

MOST = 10_000  # mixtures; more is a slip of the step
SPREADS = ("grid", "line")
Mixture = dict[str, float]


def parse_weights(raw: Any, adapters: Mapping[str, Any], check: Checker) -> tuple[Mixture, ...]:
    """Every mixture, each with a weight for all adapters (0 where it is not named).

    Raises BadRecipeError: an unknown label or word, no number, a mixture that stands twice. What a grid or a line
    repeats is left out.
    """
    if raw is None:
        if adapters:
            raise check.error("weights", "is missing", "for example [{pt: 0.3, sft: 0.7}]")
        return ({},)
    entries = [raw] if isinstance(raw, Mapping | str) else raw
    if not isinstance(entries, list) or not entries:
        raise check.error("weights", "should be a list of mixtures like {pt: 0.3, sft: 0.7}")
    found: list[Mixture] = []
    places: list[str] = []
    for n, entry in enumerate(entries):
        key = f"weights[{n}]"
        spread = _spread_of(entry)
        mixtures = (
            _spread(entry, spread, adapters, check, key) if spread else [_one(entry, adapters, check, key)]
        )
        for mixture in mixtures:
            if mixture not in found:
                found.append(mixture)
                places.append(key)
            elif not spread:
                raise check.error(key, f"is the same mixture as {places[found.index(mixture)]}")
        if len(found) > MOST:
            raise check.error(key, f"makes more than {MOST:,} mixtures", "take larger steps")
    return tuple(found)


def _spread_of(entry: Any) -> str:
    """`grid` or `line`: a mapping with that key, whose value is no number (an adapter may be called so)."""
    if isinstance(entry, Mapping):
        for name in SPREADS:
            if name in entry and not isinstance(entry[name], int | float | str):
                return name
    return ""


def _one(entry: Any, adapters: Mapping[str, Any], check: Checker, key: str) -> Mixture:
    if isinstance(entry, str):
        words = ("base", *adapters)
        if entry not in words:
            raise check.error(key, f"is {entry!r}, which is no adapter", nearest(entry, words))
        if entry == "base" and "base" in adapters:
            raise check.error(key, "is base, and an adapter is called so", "write {base: 1}, or {base: 0}")
        return {label: float(label == entry) for label in adapters}
    given = check.mapping(entry, key, adapters)
    return {label: check.number(given.get(label, 0), f"{key}.{label}") for label in adapters}


def _spread(
    entry: Mapping[str, Any], how: str, adapters: Mapping[str, Any], check: Checker, key: str
) -> list[Mixture]:
    axes_raw = check.mapping(entry, key, (how,))[how]
    at = f"{key}.{how}"
    given = check.mapping(axes_raw, at, adapters)
    if not given:
        raise check.error(at, "is empty", "for example {grid: {pt: [0, 0.5, 1], sft: [0, 0.5, 1]}}")
    rests = [label for label, axis in given.items() if axis == "rest"]
    if rests and (how == "grid" or len(rests) > 1 or len(rests) == len(given)):
        raise check.error(f"{at}.{rests[-1]}", "is rest, which one adapter of a line can be")
    axes = {label: _axis(axis, check, f"{at}.{label}") for label, axis in given.items() if label not in rests}
    if how == "grid":
        size = 1
        for axis in axes.values():
            size *= len(axis)
        if size > MOST:
            raise check.error(at, f"makes {size:,} mixtures; at most {MOST:,}", "take larger steps")
        points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    else:
        lengths = {label: len(axis) for label, axis in axes.items()}
        if len(set(lengths.values())) > 1:
            words = ", ".join(f"{label} has {count}" for label, count in lengths.items())
            raise check.error(at, f"walks its lists side by side, and they differ in length: {words}")
        points = [dict(zip(axes, values, strict=True)) for values in zip(*axes.values(), strict=True)]
    mixtures = []
    for point in points:
        mixture = {label: float(point.get(label, 0)) for label in adapters}
        for label in rests:
            mixture[label] = float(1 - sum(point.values()))
        mixtures.append(mixture)
    return mixtures


def _axis(raw: Any, check: Checker, key: str) -> list[Decimal]:
    """Numbers of one adapter: a list, or {from, to, step} or {from, to, points}; exact in decimal."""
    if isinstance(raw, list):
        if not raw:
            raise check.error(key, "should be a list with something in it")
        return [_decimal(check.number(value, f"{key}[{n}]")) for n, value in enumerate(raw)]
    if not isinstance(raw, Mapping):
        hint = "for example [0, 0.5, 1] or {from: 0, to: 1, step: 0.1}"
        raise check.error(key, f"should be a list of numbers, and is {kind_of(raw)}", hint)
    given = check.mapping(raw, key, ("from", "to", "step", "points"), ("from", "to"))
    first, last = (_decimal(check.number(given[name], f"{key}.{name}")) for name in ("from", "to"))
    if ("step" in given) == ("points" in given):
        raise check.error(key, "should have either step or points")
    if "points" in given:
        points = check.whole(given["points"], f"{key}.points", 2)
        if points > MOST:
            raise check.error(f"{key}.points", f"is {points}; at most {MOST:,}")
        return [first + (last - first) * n / (points - 1) for n in range(points)]
    step = _decimal(check.number(given["step"], f"{key}.step"))
    if step <= 0:
        raise check.error(f"{key}.step", f"should be above 0, and is {given['step']!r}")
    count = abs(last - first) / step
    if count != int(count):
        raise check.error(
            f"{key}.step", f"is {step}, which does not lead from {first} to {last} in whole steps"
        )
    if count > MOST:
        words = f"{int(count):,}" if count < 10**12 else f"{count:.0e}"
        raise check.error(f"{key}.step", f"makes {words} steps; at most {MOST:,}")
    return [first + step * n * (1 if last >= first else -1) for n in range(int(count) + 1)]


def _decimal(value: float) -> Decimal:
    return Decimal(repr(value))
