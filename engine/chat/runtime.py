"""A typed layer over llama.cpp's low-level functions: models, adapters, contexts, sampling.

`llama_cpp.Llama` loads a model per object and has no several adapters; these functions share one model between
contexts, each with its own adapter scales. Used by the chat's child, by jobs and by tests, never by the app.
One context is not for concurrent use; several contexts of a model are.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from engine.chat.protocol import Sampling
from engine.errors import BadInputError, BadTensorFileError, ChildFailedError

BATCH = 512
_WARN, _CONTINUED = 3, 5  # ggml_log_level


class _Log:
    """Passes llama.cpp's warnings and errors to stderr, and keeps the last of them for error messages."""

    def __init__(self) -> None:
        self.last: deque[str] = deque(maxlen=20)
        self.muted = False  # kept for `reason`, not shown
        self._showing = False
        self.callback = llama_cpp.llama_log_callback(self._hear)  # kept: llama.cpp calls it

    def _hear(self, level: int, text: bytes, _: object) -> None:
        self._showing = level >= _WARN if level != _CONTINUED else self._showing
        if self._showing:
            line = text.decode("utf-8", "replace")
            self.last.append(line)
            if not self.muted:
                sys.stderr.write(line)
                sys.stderr.flush()

    def listen(self) -> None:
        llama_cpp.llama_log_set(self.callback, None)

    def reason(self) -> str:
        """The last thing llama.cpp complained about, as one line ("" when nothing)."""
        lines = "".join(self.last).strip().splitlines()
        return next(
            (line.strip() for line in lines if "error" in line.lower()), lines[-1].strip() if lines else ""
        )


LOG = _Log()
LOG.listen()


def system_info() -> str:
    """llama.cpp's line about the instructions it was built for."""
    return llama_cpp.llama_print_system_info().decode("utf-8", "replace").strip()


def supports_gpu() -> bool:
    """Whether this build of llama.cpp can offload layers to a GPU."""
    return bool(llama_cpp.llama_supports_gpu_offload())


class Model:
    """One GGUF in memory (mapped), shared by all its contexts."""

    def __init__(self, path: Path, gpu_layers: int = -1, vocab_only: bool = False) -> None:
        """Load `path`; `gpu_layers` -1 offloads all layers where the build can, 0 none.

        Raises BadTensorFileError when the file is missing, no GGUF, damaged, or of an unknown architecture.
        """
        check_magic(path)
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = gpu_layers
        settings.vocab_only = vocab_only
        self.path = path
        LOG.last.clear()
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), settings)
        if not self._model:
            raise BadTensorFileError(
                f"llama.cpp cannot load {path}: {LOG.reason() or 'no reason given'}",
                "the file is damaged, not whole, or of an architecture this llama.cpp does not know",
            )
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._adapters: dict[str, Any] = {}

    def close(self) -> None:
        """Free the model and its adapters; its contexts must be closed before."""
        for adapter in self._adapters.values():
            llama_cpp.llama_adapter_lora_free(adapter)
        self._adapters.clear()
        if self._model:
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    @property
    def vocabulary(self) -> int:
        return int(llama_cpp.llama_vocab_n_tokens(self._vocab))

    @property
    def trained_context(self) -> int:
        return int(llama_cpp.llama_model_n_ctx_train(self._model))

    @property
    def parameters(self) -> int:
        return int(llama_cpp.llama_model_n_params(self._model))

    @property
    def nbytes(self) -> int:
        return int(llama_cpp.llama_model_size(self._model))

    @property
    def description(self) -> str:
        """Architecture, number of weights and type: "llama 135M Q4_K - Medium"."""
        count = self.parameters
        size = (
            f"{count / 1e9:.1f}B"
            if count >= 1e9
            else f"{count / 1e6:.1f}M"
            if count < 1e7
            else f"{count / 1e6:.0f}M"
        )
        kind = llama_cpp.llama_ftype_name(llama_cpp.llama_model_ftype(self._model)) or b""
        return f"{self.metadata('general.architecture')} {size} {kind.decode('utf-8', 'replace')}".strip()

    def metadata(self, key: str) -> str:
        """A metadata value as text, "" when the file has no such key."""
        buffer = ctypes.create_string_buffer(1 << 16)
        length = llama_cpp.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        if length >= len(buffer):
            buffer = ctypes.create_string_buffer(length + 1)
            length = llama_cpp.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if length > 0 else ""

    @property
    def chat_template(self) -> str:
        """The Jinja template in the file, or ""."""
        raw = llama_cpp.llama_model_chat_template(self._model, None)
        return raw.decode("utf-8", "replace") if raw else ""

    def special_tokens(self) -> dict[str, str]:
        """The texts of BOS, EOS and PAD by their names in chat templates ("bos_token", ...)."""
        found = {}
        for name in ("bos", "eos", "pad"):
            number = getattr(llama_cpp, f"llama_vocab_{name}")(self._vocab)
            if number >= 0:
                text = llama_cpp.llama_vocab_get_text(self._vocab, number)
                found[f"{name}_token"] = text.decode("utf-8", "replace")
        return found

    def tokenize(self, text: str, special: bool = True, add_special: bool = False) -> list[int]:
        """Token ids; `special` reads marks like `<|im_end|>` as tokens, `add_special` adds BOS where the model does."""
        data = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode()
        size = len(data) + 2
        buffer = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, size, add_special, special)
        if count < 0:
            size = -count
            buffer = (llama_cpp.llama_token * size)()
            count = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, size, add_special, special)
        return list(buffer[: max(count, 0)])

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of one token; control tokens are empty unless `special`."""
        buffer = ctypes.create_string_buffer(256)
        length = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, 256, 0, special)
        if length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, -length, 0, special)
        return buffer.raw[:length]

    def ends(self, token: int) -> bool:
        """Whether the token ends generation (EOS, end of turn)."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def load_adapter(self, label: str, path: Path) -> None:
        """Load a LoRA GGUF under a label. Raises BadTensorFileError when it does not fit this model."""
        check_magic(path)
        LOG.last.clear()
        adapter = llama_cpp.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not adapter:
            raise BadTensorFileError(
                f"llama.cpp cannot use {path} with {self.path.name}: {LOG.reason() or 'no reason given'}",
                "was it made from the same base model?",
            )
        self._adapters[label] = adapter

    def context(self, size: int = 4096, threads: int = 0) -> Context:
        """A new context of `size` tokens (at most the model's own length), with no adapter active."""
        return Context(self, size, threads or os.cpu_count() or 1)


class Context:
    """One conversation's memory on a model, with its own adapter scales. Not for concurrent use."""

    def __init__(self, model: Model, size: int, threads: int) -> None:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = min(size, model.trained_context) if model.trained_context else size
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = threads
        settings.no_perf = True
        self.model = model
        self._context = llama_cpp.llama_init_from_model(model._model, settings)
        if not self._context:
            raise ChildFailedError(
                f"llama.cpp could not make a context of {settings.n_ctx} tokens for {model.path.name}",
                "not enough memory: choose a shorter context",
            )
        self._active: dict[str, float] = {}
        self.tokens: list[int] = []  # what the memory holds

    def close(self) -> None:
        if self._context:
            llama_cpp.llama_free(self._context)
            self._context = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        return int(llama_cpp.llama_n_ctx(self._context))

    def set_threads(self, count: int) -> None:
        llama_cpp.llama_set_n_threads(self._context, count, count)

    def set_scales(self, scales: dict[str, float]) -> None:
        """Make these the active adapters; the memory, which the old ones computed, is cleared if they changed.

        A scale of 0 leaves the adapter out. Raises BadInputError for a label that is not loaded.
        """
        unknown = scales.keys() - self.model._adapters.keys()
        if unknown:
            raise BadInputError(
                f"no adapter {sorted(unknown)[0]!r} is loaded",
                f"loaded: {', '.join(self.model.adapters) or 'none'}",
            )
        active = {label: scale for label, scale in scales.items() if scale != 0}
        if active == self._active:
            return
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * len(active))(
            *(self.model._adapters[label] for label in active)
        )
        factors = (ctypes.c_float * len(active))(*active.values())
        if llama_cpp.llama_set_adapters_lora(self._context, handles, len(active), factors) != 0:
            raise ChildFailedError(f"llama.cpp refused the adapter scales {active}")
        self._active = active
        self.clear()

    def clear(self) -> None:
        """Forget all tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self.tokens = []

    def keep(self, count: int) -> None:
        """Forget all tokens after the first `count`."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), 0, count, -1)
        self.tokens = self.tokens[:count]

    def feed(self, tokens: Sequence[int]) -> None:
        """Read at most BATCH tokens after those already read; then `logits` are of the last one."""
        if len(tokens) > BATCH or len(self.tokens) + len(tokens) > self.size:
            raise ValueError("too many tokens for one batch or for the context")
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        code = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if code != 0:
            raise ChildFailedError(f"llama.cpp could not go on (llama_decode returned {code})")
        self.tokens += tokens

    def logits(self) -> npt.NDArray[np.float32]:
        """Logits after the last token read, shape (vocabulary,), float32, a copy."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.model.vocabulary,)).copy()

    def log_probabilities(self, tokens: Sequence[int]) -> npt.NDArray[np.float64]:
        """log p of every possible next token after each prefix of `tokens`, shape (len(tokens), vocabulary)."""
        self.clear()
        rows = []
        for token in tokens:
            self.feed([token])
            logits = self.logits().astype(np.float64)
            logits -= logits.max()
            rows.append(logits - np.log(np.exp(logits).sum()))
        return np.stack(rows)


class Sampler:
    """Draws tokens from a context's last logits, by `Sampling`."""

    def __init__(self, sampling: Sampling) -> None:
        self._chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        if sampling.temperature <= 0:
            steps = [llama_cpp.llama_sampler_init_greedy()]
        else:
            steps = [llama_cpp.llama_sampler_init_temp(sampling.temperature)]
            if sampling.top_k > 0:
                steps.append(llama_cpp.llama_sampler_init_top_k(sampling.top_k))
            if sampling.top_p < 1:
                steps.append(llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1))
            steps.append(llama_cpp.llama_sampler_init_dist(sampling.seed & 0xFFFFFFFF))
        for step in steps:
            llama_cpp.llama_sampler_chain_add(self._chain, step)

    def draw(self, context: Context) -> int:
        return int(llama_cpp.llama_sampler_sample(self._chain, context._context, -1))

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._chain)


def check_magic(path: Path) -> None:
    """Raise BadTensorFileError when the file is missing, empty, or does not begin with GGUF's magic."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise BadTensorFileError(f"cannot read {path}: {error.strerror}") from error
    if head != b"GGUF":
        raise BadTensorFileError(
            f"{path} is not a GGUF file (it begins with {head!r})",
            "make one: medmerge gguf CHECKPOINT --out FILE",
        )
