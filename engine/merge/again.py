"""Verify a finished merge by its own manifest, or by a recipe. Called by engine/merge/job.py (`medmerge verify DIR`).

The manifest (or the recipe, for a merge that another tool made) says what was asked; the verdict is made from the
files as they are now.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import BadInputError
from engine.jobs.events import EventWriter
from engine.merge.execute import NOT_WEIGHTS, question
from engine.merge.manifest import NAME, read_manifest
from engine.merge.manifest_check import place_of_input
from engine.merge.plan import make_plan
from engine.merge.recipe import parse


def verify_again(merged: Path, events: EventWriter) -> dict[str, Any]:
    """The verdict's JSON, with exit_code, for any method and any weights. Writes nothing.

    Raises:
        BadInputError: no manifest, or a merged adapter, whose files `--manifest` checks.
        BadRecipeError, BadModelError, BadAdapterError: the recipe or an input cannot be read any more.
    """
    manifest = read_manifest(merged)
    if manifest["output"].get("kind", "checkpoint") != "checkpoint":
        raise BadInputError(
            f"{merged} is a merged adapter: its weights are checked only while it is made",
            "medmerge verify --manifest checks that its files are still the same",
        )
    return verify_recipe(merged, recipe_where_it_lies(merged, manifest), events, str(merged / NAME))


def verify_recipe(
    merged: Path, document: dict[str, Any], events: EventWriter, where: str = "recipe"
) -> dict[str, Any]:
    """The verdict's JSON, with exit_code: is `merged`, made by any tool, what the recipe asks for.

    `where` names the document in errors; its output counts for nothing.

    Raises BadRecipeError, BadModelError, BadAdapterError: the recipe or an input cannot be read.
    """
    from engine.merge.verify import verify_merge

    plan = make_plan(parse(document, where, []))
    base, asked = question(plan)
    verdict = verify_merge(merged, base, {}, None, events, allow_extra_files=NOT_WEIGHTS, asked=asked)
    return {**verdict.to_json(), "exit_code": verdict.exit_code}


def recipe_where_it_lies(merged: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest's recipe, its inputs where they are now (a workspace may have been moved as a whole)."""
    recipe = dict(manifest["recipe"])
    if manifest.get("base"):
        recipe["base"] = str(place_of_input(merged, manifest["base"]))
    for kind in ("adapters", "models"):
        described = manifest.get(kind) or {}
        if recipe.get(kind):
            recipe[kind] = {
                label: {**entry, "path": str(place_of_input(merged, described[label]))}
                if label in described
                else entry
                for label, entry in recipe[kind].items()
            }
    return recipe
