"""Run mergekit on every case and keep its results: tests/peers/goldens/NAME.safetensors and parameters.json.

    make mergekit && .venv-mergekit/bin/python tests/peers/make_goldens.py [--into DIR] [CASE...]
    .venv-mergekit/bin/python tests/peers/make_goldens.py --resolve CONFIGS.json > RESOLVED.json

Runs in mergekit's own environment (torch, no medmerge). parameters.json holds, for every case, the numbers that
mergekit itself resolved for each tensor, its version, and a hash of the inputs. DARE draws are seeded. With
--resolve nothing is merged: for a list of configs those numbers are printed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from cases import CASES  # type: ignore[import-not-found]  # noqa: E402
from inputs import digest, inputs  # type: ignore[import-not-found]  # noqa: E402

SEED = 7


def merge(name: str, folder: Path) -> Path:
    """mergekit's result of a case."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(CASES[name])),
        f"out-{name}",
        MergeOptions(
            copy_tokenizer=False, quiet=True, random_seed=SEED, lora_merge_cache=str(folder / "loras"),
            write_model_card=False,
        ),
    )  # fmt: skip
    return folder / f"out-{name}"


def resolve(config: dict[str, Any]) -> dict[str, Any]:
    """The parameters that mergekit plans for each tensor: {tensor: {shared: {...}, models: {model: {...}}}}."""
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner
    from transformers import AutoConfig

    options = MergeOptions(lora_merge_cache="loras", quiet=True)
    LoaderCache().setup(options=options)
    parsed = MergeConfiguration.model_validate(config)
    architecture = get_architecture_info(parsed, options)
    planner = MergePlanner(parsed, architecture, options, AutoConfig.from_pretrained("base"))
    planner._plan()
    found = {}
    for weight, task in planner._tensors:
        assert isinstance(task, ExecuteMergeMethodTask)
        found[weight.name] = {
            "shared": dict(task.parameters.items()),
            "models": {str(model): dict(own.items()) for model, own in task.input_parameters.items()},
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--into", type=Path, default=HERE / "goldens")
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE")
    parser.add_argument("--resolve", type=Path, metavar="CONFIGS.json")
    args = parser.parse_args()
    configs = json.loads(args.resolve.read_text()) if args.resolve else None
    import yaml

    peers = ("mergekit", "torch", "transformers", "peft")
    into = args.into.resolve()
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = inputs(Path(scratch) / "inputs")
        os.chdir(folder)
        if configs is not None:
            print(json.dumps([resolve(config) for config in configs]))
            return
        found: dict[str, Any] = {
            "versions": {name: importlib.metadata.version(name) for name in peers},
            "inputs": digest(folder),
            "cases": {},
        }  # fmt: skip
        for name in args.cases:
            files = list(merge(name, folder).glob("*.safetensors"))
            found["cases"][name] = resolve(yaml.safe_load(CASES[name]))
            assert len(files) == 1, files
            shutil.copy(files[0], into / f"{name}.safetensors")
    (into / "parameters.json").write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n")
    print(f"{len(args.cases)} cases in {into}")


if __name__ == "__main__":
    main()
