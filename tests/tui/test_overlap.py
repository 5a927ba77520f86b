"""The merge screen's picture of how two adapters interfere: signs kept, one scale, gaps where nothing is."""

from __future__ import annotations

from tui.parts import FACT_WIDTH
from tui.results import overlap
from tui.widgets.overlap import overlap_content


def said(*modules: tuple[str, float]) -> dict[str, object]:
    return {
        "overall": {"cosine": 0.1, "sign_conflict": 0.49, "subspace_overlap": 0.11, "norm": {"pt": 1.0}},
        "modules": [{"name": name, "cosine": cosine} for name, cosine in modules],
    }


def test_a_strip_for_each_kind_on_one_scale() -> None:
    view = overlap(
        said(
            ("model.layers.0.self_attn.q_proj", 0.1),
            ("model.layers.1.self_attn.q_proj", -0.8),
            ("model.layers.0.mlp.up_proj", 0.8),
            ("lm_head", 0.5),
        )
    )
    text = overlap_content(view, 100).plain
    assert "cosine 0.10 · sign conflict 49% · shared subspace 11%" in text
    assert "█ 0.80" in text and "q ▁▓" in text and "up █ " in text
    assert "\n" not in overlap_content(view, 16).plain, "no room for a strip"


def test_five_kinds_of_thirty_layers_stay_within_the_line() -> None:
    kinds = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    view = overlap(said(*((f"model.layers.{i}.x.{kind}", i / 30) for i in range(30) for kind in kinds)))
    for width in (66, 106, 226):
        first, second = overlap_content(view, width).plain.split("\n")
        assert len(first) <= width and len(second) <= FACT_WIDTH + width
        assert second.count("█") >= 5 and "down ▁" in second


def test_nothing_in_common() -> None:
    assert overlap_content(overlap({}), 80).plain == "no module in common"
