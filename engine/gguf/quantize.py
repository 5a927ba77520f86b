"""The types a GGUF can have, and llama.cpp's own quantiser for those that are not written directly."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from engine.errors import BadRecipeError, ChildFailedError
from engine.jobs.events import EventWriter

DIRECT = ("f32", "f16", "bf16", "q8_0")
# llama.cpp refuses these without an importance matrix, which this program does not make.
NEED_IMATRIX = ("iq1_m", "iq1_s", "iq2_s", "iq2_m", "iq2_xs", "iq2_xxs", "iq3_xxs", "q2_k_s")
# For weights trained in that form, not for rounding others to.
SPECIAL = ("tq1_0", "tq2_0", "mxfp4_moe", "nvfp4", "q1_0", "q2_0")


def types() -> dict[str, int]:
    """Every type that can be asked for, by name, with llama.cpp's LLAMA_FTYPE number."""
    import llama_cpp

    found = {"f32": llama_cpp.LLAMA_FTYPE_ALL_F32}
    for name, value in vars(llama_cpp).items():
        match = re.match(r"LLAMA_FTYPE_MOSTLY_(\w+)$", name)
        if match and match[1].lower() not in NEED_IMATRIX + SPECIAL:
            found[match[1].lower()] = int(value)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def file_type(name: str) -> int:
    """LLAMA_FTYPE of a type name. Raises BadRecipeError that lists the types there are."""
    known = types()
    if name.lower() not in known:
        why = (
            "needs an importance matrix, which is not made here"
            if name.lower() in NEED_IMATRIX
            else "does not exist"
        )
        raise BadRecipeError(f"GGUF type {name!r} {why}", f"types: {', '.join(known)}")
    return known[name.lower()]


def quantise(source: Path, target: Path, name: str, events: EventWriter, threads: int = 0) -> None:
    """Quantise a GGUF into another with `llama_model_quantize`; `threads` 0 means all cores.

    Runs in a thread of its own, so that a cancel (SIGTERM) is heard while llama.cpp works; the caller removes
    the unfinished target. Raises ChildFailedError with llama.cpp's own last messages.
    """
    import llama_cpp

    from engine.chat.runtime import LOG

    number = file_type(name)
    said: list[str] = []
    position = re.compile(r"\[\s*(\d+)/\s*(\d+)\]\s+(\S+)")

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, _: object) -> None:
        line = text.decode("utf-8", "replace")
        said.append(line)
        match = position.search(line)
        if match:
            events.progress(int(match[1]), int(match[2]), "tensors", match[3].rstrip(","), phase="quantise")

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = number
    settings.nthread = threads
    settings.max_buf_size = 1 << 30
    result: list[int] = []

    def work(keep: object = listen) -> None:  # llama.cpp calls `listen` as long as this thread runs
        result.append(llama_cpp.llama_model_quantize(bytes(source), bytes(target), settings))

    llama_cpp.llama_log_set(listen, None)
    try:
        worker = threading.Thread(target=work, name="quantise", daemon=True)
        worker.start()
        while worker.is_alive():
            worker.join(0.2)
    finally:
        LOG.listen()
    if result != [0]:
        tail = "".join(said)[-600:].strip()
        raise ChildFailedError(
            f"llama.cpp could not quantise {source.name} to {name}: {tail or 'no message'}"
        )
