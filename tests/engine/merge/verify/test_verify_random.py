"""No false alarm on random right merges: any method, dtype, size of deltas and parameters.

MEDMERGE_RANDOM_MERGES says how many (100; 1,000 takes about two minutes).
"""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch

from tests.engine.merge.verify.scenes import MODULES, MakeScene
from tests.engine.merge.verify.test_verify_methods import METHODS, Setting, merged_adapters, verify

COUNT = int(os.environ.get("MEDMERGE_RANDOM_MERGES", "100"))
PARTS = 10


@pytest.mark.parametrize("part", range(PARTS))
def test_random_right_merges_pass(make_scene: MakeScene, part: int) -> None:
    random = np.random.default_rng(part)
    for number in range(-(-COUNT // PARTS)):
        b_std = float(random.choice([0.05, 0.02, 0.005, 0.002]))
        modules = {
            label: [m for m in MODULES if random.random() < 0.5] or MODULES[:2] for label in ("pt", "sft")
        }
        scene = make_scene(
            seed=int(random.integers(1 << 30)), b_std=b_std, folder=f"{part}-{number}",
            pt={"modules": modules["pt"], "rank": int(random.choice([1, 4, 8]))},
            sft={"modules": modules["sft"], "alpha": float(random.choice([4, 16, 32]))},
        )  # fmt: skip
        pt, sft = (round(float(w), 2) or 0.5 for w in random.uniform(-1.5, 1.5, 2))
        setting = Setting(
            str(random.choice(METHODS)),
            weights={"pt": pt, "sft": sft},
            density=round(float(random.uniform(0.05, 1)), 2),
            t=round(float(random.uniform(0, 1)), 2),
            lam=1.0,
            normalize=None,
            rescale=bool(random.random() < 0.7),
            seed=int(random.integers(1000)),
        )
        dtype = [torch.bfloat16, torch.float16, torch.float32][int(random.integers(3))]
        verdict = verify(scene, merged_adapters(scene, setting, dtype), setting)
        assert verdict.ok, (setting, dtype, b_std, verdict.message)
        shutil.rmtree(scene.root)
