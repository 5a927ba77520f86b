"""A checkpoint folder as one GGUF file, of any type llama.cpp has.

f32, f16, bf16 and q8_0 are written directly from the checkpoint's rows. Every other type goes through
llama.cpp's quantiser, from an exact intermediate file (bf16 weights stay bf16) that is removed afterwards.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine
from engine.errors import ChildFailedError
from engine.gguf.architecture import Architecture
from engine.gguf.check import compare_tokens
from engine.gguf.quantize import DIRECT, file_type, quantise
from engine.gguf.tensors import PlannedTensor, ReadRows, plan_tensors
from engine.gguf.tokenizer import Tokenizer
from engine.gguf.writer import bytes_needed, new_file, write_gguf
from engine.jobs.events import EventWriter
from engine.template_check import from_record, of_manifest, records
from engine.weights import Checkpoint
from engine.weights.tensorfile import read_rows

SOURCE_KEY = "medmerge.source"
NOTE = "medmerge.json"  # what the demo base and our merges say about themselves


@dataclass(frozen=True)
class Conversion:
    """A checkpoint ready to be written: everything has been read and checked but the weights."""

    model: Checkpoint
    architecture: Architecture
    tokenizer: Tokenizer
    tensors: list[PlannedTensor]
    rows_from: dict[str, Any]  # what `rows` adds to the checkpoint, for the file's metadata

    @classmethod
    def plan(
        cls,
        source: Path,
        pre: str = "",
        rows: ReadRows = read_rows,
        rows_from: dict[str, Any] | None = None,
    ) -> Conversion:
        """Open and check the checkpoint. `rows` may add deltas to rows on the way (`rows_from` says which).

        Raises BadModelError and kin naming the file and key that is wrong.
        """
        model = Checkpoint.open(source)
        architecture = Architecture.of(model)
        tokenizer = Tokenizer.of(model, architecture, pre)
        return cls(model, architecture, tokenizer, plan_tensors(model, architecture, rows), rows_from or {})

    @property
    def exact_type(self) -> str:
        """The type that holds the checkpoint's weights without rounding."""
        if self.rows_from:
            return "f32"
        return {"BF16": "bf16", "F16": "f16"}.get(self.model.dtype, "f32")

    def write(self, path: Path, kind: str, events: EventWriter) -> None:
        """Write the file as f32, f16, bf16 or q8_0 to `path`, with all metadata."""
        ftype = file_type(kind)

        def metadata(writer: Any) -> None:
            import gguf

            writer.add_type(gguf.GGUFType.MODEL)
            writer.add_name(self.model.name)
            writer.add_file_type(ftype)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            self.architecture.write(writer)
            self.tokenizer.write(writer)
            writer.add_string(SOURCE_KEY, json.dumps(self._source(), sort_keys=True))

        write_gguf(path, self.architecture.name, metadata, self.tensors, kind, events)

    def _source(self) -> dict[str, Any]:
        """Where the weights came from: names and hashes, no paths of this machine."""
        return {
            "name": self.model.name,
            "sha256": self.model.sha256,
            "dtype": self.model.dtype,
            "writer": f"medmerge {engine.__version__}",
            **merged_from(self.model.folder, self.rows_from),
        }


def merged_from(folder: Path, added: dict[str, Any]) -> dict[str, Any]:
    """`base` and `adapters` (name, hash, weight, template by label) of what a folder's weights are a merge of.

    From its manifest; `added` are adapters that are merged on the way into the file, on top of what is in the folder.
    `templates` are those of further adapters, which were inside before. Empty where nothing was merged.
    """
    own = {"adapters": added} if added else {}
    try:
        manifest = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        adapters = {
            label: {"name": entry["name"], "sha256": entry["sha256"], "weight": manifest["asked"][label]}
            | from_record(label, entry).to_dict()
            for label, entry in manifest["adapters"].items()
        }
        inside = records(of_manifest(manifest if added else {**manifest, "adapters": {}}))
        if not added and manifest["base"] is not None:
            own = {"base": manifest["base"]["name"], "adapters": adapters}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return own
    return {**own, **({"templates": inside} if inside else {})}


def convert(conversion: Conversion, out: Path, kind: str, events: EventWriter) -> None:
    """Write `out` as type `kind`. The file appears whole or not at all.

    The finished file's token ids are compared with the checkpoint's own tokenizer before it gets its name.

    Raises: BadRecipeError (no such type), TargetExistsError, NoSpaceError, BadModelError (weights, or token
    ids that differ), ChildFailedError (llama.cpp refuses), CancelledError.
    """
    kind = kind.lower()
    file_type(kind)  # a type that does not exist is refused before anything is written
    direct = kind in DIRECT
    exact = kind if direct else conversion.exact_type
    needed = bytes_needed(conversion.tensors, exact)
    if not direct:
        needed += bytes_needed(conversion.tensors, "q8_0")
    with new_file(out, needed, f"a {kind} GGUF") as partial:
        if direct:
            conversion.write(partial, kind, events)
        else:
            whole = partial.with_name(f"{out.name}.{exact}{partial.suffix}")
            try:
                conversion.write(whole, exact, events)
                quantise(whole, partial, kind, events)
            finally:
                whole.unlink(missing_ok=True)
            if partial.stat().st_size == 0:
                raise ChildFailedError(f"llama.cpp wrote nothing to {partial}")
        compare_tokens(partial, conversion.model.folder)
