"""The merge screen's picture of how two adapters interfere: signs kept, one scale, gaps where nothing is."""

from __future__ import annotations

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
    text = overlap_content(view, 100, tall=True).plain
    assert "cosine 0.10 · sign conflict 49% · shared subspace 11%" in text
    assert "█ 0.80" in text and "q ▁▓" in text and "up █ " in text
    assert "\n" not in overlap_content(view, 100, tall=False).plain


def test_nothing_in_common() -> None:
    assert overlap_content(overlap({}), 80, tall=True).plain == "no module in common"
