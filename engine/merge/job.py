"""What background jobs call: merge, plan, verify, interference. Parameters and results are JSON.

Each loads numpy with one BLAS thread first: the workers here are our own threads, and OpenBLAS's, one team
per product, would fight them (measured: 60 times slower on a busy machine).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from engine.jobs.events import EventWriter

_BLAS_SETTINGS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def load_numpy_single_threaded() -> None:
    """Import numpy so that its BLAS starts no threads; no effect where numpy is loaded already.

    BLAS reads these settings once, when it is loaded; they are put back for processes started from here.
    """
    before = {name: os.environ.get(name) for name in _BLAS_SETTINGS}
    os.environ.update(dict.fromkeys(_BLAS_SETTINGS, "1"))
    try:
        import numpy  # noqa: F401
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run_merge(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """params: recipe (a recipe document with absolute paths), verify (bool, default True), threads, device,
    strict_base (optional: refuse a base that is not the one an adapter was trained on).

    `device`: "cpu" (default), or where torch is to do the products and sums ("cuda", "cuda:1").
    """
    load_numpy_single_threaded()
    from engine.merge.execute import merge
    from engine.merge.kernel import use_device
    from engine.merge.recipe import parse

    recipe = parse(params["recipe"], "recipe", [])
    with use_device(str(params.get("device") or "cpu")):
        return merge(
            recipe,
            events,
            verify=bool(params.get("verify", True)),
            threads=params.get("threads"),
            strict_base=bool(params.get("strict_base", False)),
        )


def run_plan(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """params: recipe. Returns the plan with its cost and the predicted rounding loss; writes nothing.

    `outputs` has the bytes of what is written beside or instead of a checkpoint, by kind ("adapter", "q8_0").
    """
    load_numpy_single_threaded()
    from engine.merge.execute import outputs
    from engine.merge.forecast import forecast
    from engine.merge.plan import make_plan, refuse_broken_adapters
    from engine.merge.recipe import parse

    plan = make_plan(parse(params["recipe"], "recipe", []))
    refuse_broken_adapters(plan)
    document = plan.to_dict()
    for warning in document["warnings"]:
        events.warning(warning)
    return {**document, "outputs": outputs(plan), **forecast(plan, events), "exit_code": 0}


def run_verify(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """params: merged, base, adapters {label: path}, weights {label: number} or None, manifest (bool).

    `models` {label: path} instead of adapters are full models, seen from the base, or without one from the first.
    With `recipe` (a recipe document) it says what was asked, by any method; without that and without a base the
    merge's own manifest does. With `manifest` only the hashes of an earlier merge are checked, and nothing else is
    needed.
    """
    load_numpy_single_threaded()
    if params.get("manifest"):
        from engine.merge.manifest_check import check_manifest

        return check_manifest(Path(params["merged"]), events)
    if params.get("recipe"):
        from engine.merge.again import verify_recipe

        return verify_recipe(Path(params["merged"]), params["recipe"], events)
    if params.get("models"):
        return _verify_models(params, events)
    if not params.get("base"):
        from engine.merge.again import verify_again

        return verify_again(Path(params["merged"]), events)
    from engine.merge.verify import verify_merge

    verdict = verify_merge(
        Path(params["merged"]),
        Path(params["base"]),
        {label: Path(path) for label, path in params["adapters"].items()},
        params.get("weights"),
        events,
    )
    return {**verdict.to_json(), "exit_code": verdict.exit_code}


def _verify_models(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    from engine.merge.verify import Asked, verify_merge

    models = {label: Path(path) for label, path in params["models"].items()}
    base = Path(params["base"]) if params.get("base") else None
    weights = params.get("weights")
    asked = Asked.of_models(models, weights or {}, from_base=base is not None)
    verdict = verify_merge(
        Path(params["merged"]), base, {}, None, events, asked=asked, known=weights is not None
    )
    return {**verdict.to_json(), "exit_code": verdict.exit_code}


def run_interference(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """params: adapters {label: path}, base (optional: then the adapters are checked against it first)."""
    load_numpy_single_threaded()
    from engine.merge.interference import compare

    adapters = {label: Path(path) for label, path in params["adapters"].items()}
    if params.get("base"):
        from engine.weights import Adapter, Checkpoint

        base = Checkpoint.open(Path(params["base"]))
        for path in adapters.values():
            Adapter.open(path).match(base)
    return {**compare(adapters, events), "exit_code": 0}
