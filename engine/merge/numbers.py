"""The numbers of a recipe by tensor: weights as asked and as they count, densities, t, and the parts they make."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import BadRecipeError
from engine.merge.inputs import Inputs
from engine.merge.layout import Part
from engine.merge.recipe import LINEAR, Entry, Recipe
from engine.merge.selectors import DEFAULT, Spec, level_at, matching, resolve


def densities(entry: Entry, recipe: Recipe, names: Sequence[str], layers: int) -> dict[str, float]:
    """An entry's own density must match its tensors; the recipe's is for all entries together."""
    if entry.density is not None:
        return resolve(entry.density, names, entry.label, layers, "density")[0]
    return {name: _lenient(recipe.parameters.density, name, layers, "density") for name in names}


def t_of(recipe: Recipe, inputs: Inputs, layers: int) -> dict[str, float]:
    names = dict.fromkeys(name for changed in inputs.changes.values() for name in changed)
    return resolve(recipe.parameters.t, names, "parameters", layers, "t")[0]


def _lenient(spec: Spec, name: str, layers: int, what: str) -> float:
    found = matching(spec, name)
    if not found and DEFAULT not in spec:
        raise BadRecipeError(f"parameters.{what} gives {name} no number", "add `default: NUMBER` to it")
    winner = found[-1] if found else DEFAULT
    return level_at(spec[winner], winner, name, layers)


def counted(
    recipe: Recipe, asked: dict[str, dict[str, float]]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """The weights that count after normalize and lambda, where the method is linear in them; else those asked.

    Also what the reference counts by tensor, where that is not 1: a linear merge of models is
    sum w_k X_k = (sum w_k) W + sum w_k (X_k - W).
    """
    weights = {label: dict(own) for label, own in asked.items()}
    base_weights: dict[str, float] = {}
    if recipe.method not in (*LINEAR, "dare_linear"):
        return weights, base_weights
    for name in dict.fromkeys(name for own in weights.values() for name in own):
        having = [own for own in weights.values() if name in own]
        total = sum(own[name] for own in having)
        if recipe.normalize and abs(total) < 1e-8:
            raise BadRecipeError(
                f"the weights of {name} add up to {total:g}, and normalize divides by that",
                "change the weights, or set parameters.normalize: false",
            )
        if not recipe.normalize and recipe.models and recipe.method == "linear":
            base_weights[name] = total
        for own in having:
            own[name] *= recipe.parameters.lam / (total if recipe.normalize else 1.0)
    return weights, base_weights


def parts(
    name: str,
    recipe: Recipe,
    inputs: Inputs,
    weights: dict[str, dict[str, float]],
    densities: dict[str, dict[str, float]],
) -> tuple[Part, ...]:
    found = []
    for entry in recipe.entries:
        change = inputs.changes[entry.label].get(name)
        weight = weights[entry.label].get(name, 0.0)
        density = densities.get(entry.label, {}).get(name, 1.0)
        if recipe.method == "slerp":
            found.append(
                Part(
                    entry.label, weight, change if weight else None, 1.0, inputs.rows.get((entry.label, name))
                )
            )
        elif change is not None and weight != 0.0 and density > 0.0:  # 0 leaves the base's bytes alone
            found.append(Part(entry.label, weight, change, density, inputs.rows.get((entry.label, name))))
    return tuple(found) if any(part.change is not None for part in found) else ()
