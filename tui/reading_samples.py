"""The stored samples behind one number, as the app shows them: texts split and labelled by today's rules.

Runs in threads (reads Parquet with polars); `tui.backend` calls it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tui.snapshots import SampleRow, SampleSet

if TYPE_CHECKING:
    from engine.evaluate.summary import MetricRow

AT_ONCE = 1000
FACTS = ("finish", "new_tokens", "category", "tokens", "seed")
PROBES = {"harmful_refusal_rate": "harmful", "over_refusal_rate": "safe", "advice_refusal_rate": "advice"}
FAMILY = {"bleu": "Bleu", "chrf": "Chrf", "rouge1": "Rouge", "rouge2": "Rouge", "rougeL": "Rouge"}


def samples_of(run: Path, row: MetricRow) -> SampleSet:
    """The samples of the row's model, task, template and decoding; of all seeds, in the order of the data.

    More than AT_ONCE answers to probes come without labels: `labelled` gives them a part at a time.
    """
    from engine.evaluate.store import RunStore

    store = RunStore(run)
    prompts = store.prompts()
    task, _, category = row.task.partition("/")
    found: list[SampleRow] = []
    kind = ""
    for entry in store.cells()["cells"]:
        spec = entry["spec"]
        if not _behind(spec, row, task) or not store.is_done(entry["hash"]):
            continue
        kind = spec["kind"]
        read = _reader(kind, entry["hash"])
        for stored in store.frame(entry["hash"]).to_dicts():
            if category and stored.get("category") != category:
                continue
            if row.metric in PROBES and stored.get("probe") not in (PROBES[row.metric], None):
                continue
            prompt = prompts.get(str(stored.get("prompt_sha256")), "(prompt not stored)")
            found.append(read(stored, prompt))
    if kind == "probes" and len(found) <= AT_ONCE:
        found = labelled(run, found)
    metric = row.metric.removesuffix("_raw").removesuffix("_strip")
    scored_by = ""
    if kind == "generation":
        scored_by = metric if metric in FAMILY else "rougeL"
    names = {"references": "ref ppl", "perplexity": "ppl", "instructions": "kept", "multiple_choice": "ahead"}
    return SampleSet(row.model, tuple(found), names.get(kind, ""), scored_by, kind == "probes")


def _behind(spec: dict[str, Any], row: MetricRow, task: str) -> bool:
    from engine.evaluate.summary import label_of

    decoding = (spec.get("decoding") or {}).get("name", "")
    same = label_of(spec) == row.model and spec["task"]["name"] == task
    return same and spec.get("template", "") == row.template and decoding == row.decoding


def _reader(kind: str, cell: str) -> Callable[[dict[str, Any], str], SampleRow]:
    """How rows of this kind of cell become sample rows."""
    if kind in ("references", "perplexity"):
        return lambda stored, prompt: _likelihood(stored, prompt, cell)
    if kind == "multiple_choice":
        return lambda stored, prompt: _choice(stored, prompt, cell)

    def answer(stored: dict[str, Any], prompt: str) -> SampleRow:
        shown = _answer(stored, prompt, cell)
        if kind == "generated_choice":
            return _letter(stored, shown)
        if kind == "instructions":
            return _instructed(stored, shown)
        return shown

    return answer


def _facts(stored: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(
        (key.replace("_", " "), str(stored[key])) for key in FACTS if stored.get(key) not in (None, "")
    )


def _answer(stored: dict[str, Any], prompt: str, cell: str) -> SampleRow:
    from engine.evaluate.think import split_think

    raw = str(stored.get("raw") or "")
    split = split_think(raw, opened=bool(stored.get("opened")))
    return SampleRow(
        str(stored.get("id")), prompt, str(stored.get("reference") or ""), split.answer, _facts(stored),
        thought=split.thought, think=split.kind, cell=cell, seed=_seed(stored),
    )  # fmt: skip


def _seed(stored: dict[str, Any]) -> str:
    return "" if stored.get("seed") is None else str(stored["seed"])


def labelled(run: Path, rows: Sequence[SampleRow]) -> list[SampleRow]:
    """Answers to probes with the label the rules give, and a person's own where there is one."""
    from engine.evaluate import corrections

    by_hand = corrections.load(run)
    return [_labelled(row, by_hand) for row in rows]


def _labelled(shown: SampleRow, by_hand: dict[tuple[str, str, str], str]) -> SampleRow:
    from engine.evaluate.rows import sha256

    automatic = _automatic(shown.text)
    given = by_hand.get((shown.cell, shown.id, sha256(shown.text))) if by_hand else None
    return replace(shown, automatic=automatic, label=given or automatic, by_hand=given is not None)


@lru_cache(maxsize=100_000)  # read again after every correction
def _automatic(text: str) -> str:
    from engine.evaluate.refusals import label_answer

    return label_answer(text)


def _letter(stored: dict[str, Any], shown: SampleRow) -> SampleRow:
    """A letter the model wrote, as it was read when it was stored."""
    options = tuple((str(option), None) for option in stored.get("options") or ())
    chosen, answer = stored.get("chosen"), int(stored.get("answer", -1))
    label = "unparsed" if chosen is None else ""
    place = -1 if chosen is None else int(chosen)
    return replace(
        shown, options=options, answer=answer, chosen=place, right=place == answer, label=label,
        automatic=label,
    )  # fmt: skip


def _instructed(stored: dict[str, Any], shown: SampleRow) -> SampleRow:
    from engine.evaluate.instructions import check_answer

    told = json.loads(stored["instructions"])
    checked = check_answer(told, stored["asked"], shown.text)
    kept = sum(checked.strict)
    facts = tuple(
        (("kept" if good else "broken"), str(one.get("id", "")))
        for one, good in zip(told, checked.strict, strict=True)
    )
    share = kept / len(told) if told else None
    return replace(shown, right=all(checked.strict), score=share, facts=shown.facts + facts)


def _choice(stored: dict[str, Any], prompt: str, cell: str) -> SampleRow:
    """Options with their log-likelihoods; the score is how far the right one is ahead of the best other."""
    scores = [float(value) for value in stored.get("logprobs") or ()]
    texts = [str(option) for option in stored.get("options") or ()]
    padded: list[float | None] = [*scores, *[None] * (len(texts) - len(scores))]
    answer, chosen = int(stored.get("answer", -1)), int(stored.get("chosen", -1))
    ahead = None
    if len(scores) > 1 and 0 <= answer < len(scores):
        ahead = scores[answer] - max(value for place, value in enumerate(scores) if place != answer)
    return SampleRow(
        str(stored.get("id")), prompt, "", "", (("scoring", str(stored.get("scoring") or "")),),
        right=chosen == answer, score=ahead, cell=cell, options=tuple(zip(texts, padded, strict=True)),
        answer=answer, chosen=chosen,
    )  # fmt: skip


def _likelihood(stored: dict[str, Any], prompt: str, cell: str) -> SampleRow:
    tokens, total = int(stored.get("tokens") or 0), float(stored.get("logprob") or 0.0)
    score = math.exp(min(700.0, -total / tokens)) if tokens else None
    facts = (("tokens", str(tokens)), ("log-likelihood", f"{total:.1f} nats"))
    cut = (("cut", "at max_tokens"),) if stored.get("cut") else ()
    reference = str(stored.get("reference") or "")
    return SampleRow(str(stored.get("id")), prompt, reference, "", facts + cut, score=score, cell=cell)


def scores_of(texts: Sequence[str], references: Sequence[str], metric: str) -> list[float]:
    """An overlap metric of each text alone against its reference. Sentence BLEU is smoothed (sacreBLEU's exp)."""
    import numpy as np

    from engine.evaluate.overlap import scores

    if not texts:
        return []
    family = getattr(scores, FAMILY[metric])
    measured = family(list(texts), list(references)).measure(np.arange(len(texts)))
    chosen = next(one for one in measured if one.name == metric)
    return [float(value) for value in chosen.combine(chosen.stats)]
