"""mergekit configs (YAML) read as recipes: what both programs have; the rest is refused or noted by name.

    structure   models, `model+lora` pairs and slices of a config, checked
    values      what a parameter is at each tensor: filters, gradients, scopes; the same as selectors
    convert     is_mergekit, read_mergekit, from_mergekit: the recipe document and the notes

docs/mergekit.md has the table of what is read, and where results differ; tests/peers measures it.
"""

from engine.merge.mergekit.convert import Imported, from_mergekit, is_mergekit, read_mergekit

__all__ = ["Imported", "from_mergekit", "is_mergekit", "read_mergekit"]
