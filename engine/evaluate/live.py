"""One model in memory, any mixture of adapters written into it in place. Only evaluation jobs import this.

Each touched tensor is computed from the bytes of the base file in float32,

    W = W_base + sum_i (a_i * scale_i) * B_i @ A_i        one float32 addmm over all adapters at once

and rounded once to the mixture's dtype. Nothing is ever added to what the model holds already, so a hundred
mixtures one after the other leave no trace, and a mixture equals the merge that `medmerge merge` would write:
it must pass the same bound (|error before rounding| <= c 2^-24 (|W| + sum |a s| |B row| |A column|)).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.errors import BadInputError, BadModelError, BadRecipeError
from engine.weights import Adapter, Checkpoint, LoraFactor
from engine.weights.tensorfile import TensorInfo, read_bytes, read_rows

Weight = float | Mapping[str, float]  # one number, or {base tensor name: number}

_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class LiveModel:
    """A transformers model whose weights are one mixture at a time.

    Attributes:
        model: the causal language model, in eval mode, on `device`.
        tokenizer: the base's tokenizer.
        dtype: what every weight is rounded to ("bfloat16", ...).
        compute: the dtype the model multiplies in; float32 holds the rounded weights exactly.
        weights: the mixture that is written now ({} until the first `set_weights`: the base).
    """

    def __init__(
        self,
        base: Checkpoint,
        adapters: Mapping[str, Adapter],
        dtype: str = "bfloat16",
        compute: str = "auto",
        device: str = "auto",
    ) -> None:
        """Load the base once.

        Raises:
            BadModelError: transformers cannot load it, or a tensor an adapter changes has no place of its own
                in the loaded model (tied, fused or renamed).
            BadAdapterError: an adapter does not fit the base.
            BadInputError: cuda was asked for and is not there.
        """
        exact_float32()
        self.base, self.adapters, self.dtype = base, dict(adapters), dtype
        self.device = pick_device(device)
        self.compute = pick_compute(compute, dtype, self.device)
        self._factors = {label: adapter.match(base) for label, adapter in self.adapters.items()}
        self.model = _load(base, getattr(torch, dtype)).to(self.device, getattr(torch, self.compute))
        self.tokenizer = _tokenizer(base)
        self._places = self._find_places()
        self.weights: dict[str, Weight] = {}

    def _find_places(self) -> dict[str, torch.nn.Parameter]:
        """The parameter of every base tensor some adapter changes."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        users: dict[int, list[str]] = {}
        for name, parameter in named.items():
            users.setdefault(parameter.data_ptr(), []).append(name)
        places = {}
        for factors in self._factors.values():
            for name in factors:
                if name not in named:
                    raise BadModelError(
                        f"{self.base.folder}: {name} is not a parameter of the loaded model "
                        f"({type(self.model).__name__} renames or fuses it), so it cannot be changed in place",
                        "merge first, and evaluate the merged model as the base",
                    )
                shared = users[named[name].data_ptr()]
                if len(shared) > 1:
                    raise BadModelError(
                        f"{self.base.folder}: an adapter changes {name}, which is tied to "
                        f"{', '.join(other for other in shared if other != name)}",
                        "merge first (which unties them), and evaluate the merged model as the base",
                    )
                places[name] = named[name]
        return places

    @torch.inference_mode()
    def set_weights(self, weights: Mapping[str, Weight]) -> None:
        """Write the mixture; labels that are left out count as 0, and all zero restores the base's bits.

        A weight is one number, or a number for every tensor the adapter changes (layer-wise mixtures).

        Raises BadRecipeError for a label that is no adapter here, or tensors that are not just the adapter's own.
        """
        unknown = sorted(set(weights) - set(self.adapters))
        if unknown:
            raise BadRecipeError(
                f"no adapter is labelled {unknown[0]!r}", f"known: {', '.join(self.adapters)}"
            )
        whole = {label: self._by_tensor(label, weights.get(label, 0.0)) for label in self.adapters}
        self.weights = {}  # an interruption leaves a mixture that is neither
        for name, parameter in self._places.items():
            terms = [
                (by_tensor[name], self._factors[label][name])
                for label, by_tensor in whole.items()
                if by_tensor.get(name, 0.0) != 0
            ]
            mixed = mixed_tensor(self.base.tensors[name], terms, getattr(torch, self.dtype), self.device)
            parameter.copy_(mixed.view(parameter.shape))
        self.weights = {
            label: dict(weight) if isinstance(weight := weights.get(label, 0.0), Mapping) else float(weight)
            for label in self.adapters
        }

    def _by_tensor(self, label: str, weight: Weight) -> dict[str, float]:
        names = self._factors[label].keys()
        if not isinstance(weight, Mapping):
            return dict.fromkeys(names, float(weight))
        odd = sorted(names ^ weight.keys())
        if odd:
            what = "changes no" if odd[0] in weight else "has no weight for"
            raise BadRecipeError(f"adapter {label} {what} {odd[0]}", "give each of its tensors a weight")
        return {name: float(value) for name, value in weight.items()}


def mixed_tensor(
    tensor: TensorInfo,
    terms: list[tuple[float, LoraFactor]],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """W_base + sum a * scale * B @ A in float32, rounded once to `dtype`; shape (rows, columns) on `device`.

    Without terms the base's own values are rounded (and equal the base's bits when the dtype is the same).
    """
    raw = torch.frombuffer(bytearray(read_bytes(tensor)), dtype=_TORCH[tensor.dtype])
    wide = raw.to(device).to(torch.float32).view(tensor.rows, tensor.columns)
    if terms:
        left, right = [], []
        for weight, factor in terms:
            b, a = torch.from_numpy(read_rows(factor.b)), torch.from_numpy(read_rows(factor.a))
            scaled = b * (weight * factor.scale)
            left.append(a.T if factor.transposed else scaled)
            right.append(scaled.T if factor.transposed else a)
        wide = torch.addmm(wide, torch.cat(left, 1).to(device), torch.cat(right, 0).to(device))
    return wide.to(dtype)


def exact_float32() -> None:
    """Turn TF32 off: on a GPU it would cut the factors to 11 bits and the mixture would not be the merge."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def pick_device(asked: str) -> torch.device:
    """`auto` is the first CUDA device if there is one. Raises BadInputError when cuda is asked and missing."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise BadInputError(
            "device is cuda, and torch sees no GPU here", "see medmerge doctor, or use device: auto"
        )
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def pick_compute(asked: str, dtype: str, device: torch.device) -> str:
    """The dtype to multiply in. On a CPU without bf16 instructions bf16 products are emulated (8x slower)."""
    if asked == "float32" or (asked == "auto" and device.type == "cpu" and not cpu_has(dtype)):
        return "float32"
    return dtype


def cpu_has(dtype: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies that dtype in hardware, by the flags Linux shows (False where unknown)."""
    wanted = {
        "float32": {"fpu"},
        "bfloat16": {"avx512_bf16", "amx_bf16"},
        "float16": {"avx512_fp16", "amx_fp16"},
    }
    if dtype == "float32":
        return True
    try:
        flags = cpuinfo.read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return bool(wanted[dtype] & set(flags))


def _load(base: Checkpoint, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            base.folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise BadModelError(
            f"transformers cannot load {base.folder}: {error}", "is its architecture known to this version?"
        ) from error
    return model.eval().requires_grad_(False)


def _tokenizer(base: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadModelError(
            f"{base.folder} has no usable tokenizer: {error}",
            "copy tokenizer.json and tokenizer_config.json there",
        ) from error
