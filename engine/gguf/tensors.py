"""Every tensor a GGUF of a checkpoint holds: its llama.cpp name, its shape, and its rows as float32 blocks.

The rows of Llama's q and k are reordered on the way: checkpoints rotate a head's first half against its
second, llama.cpp rotates neighbouring rows. Nothing here holds more than one block of rows in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from engine.errors import BadModelError
from engine.gguf.architecture import Architecture
from engine.weights import Checkpoint, TensorInfo
from engine.weights.tensorfile import Float32Array, read_rows

BLOCK_ELEMENTS = 4 << 20  # 16 MiB of float32 at a time
ReadRows = Callable[[TensorInfo, int, int], Float32Array]

_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.bias": "attn_output.bias",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate_proj.bias": "ffn_gate.bias",
    "mlp.up_proj.bias": "ffn_up.bias",
    "mlp.down_proj.bias": "ffn_down.bias",
}
_GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_COMPUTED = "rotary_emb.inv_freq"  # old checkpoints save this buffer; llama.cpp computes it


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to write. `shape` is row-major as in the checkpoint (llama.cpp shows it reversed).

    `blocks` yields its rows in order as float32 arrays (count, columns); a vector is one row.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    blocks: Callable[[], Iterator[Float32Array]]

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape))

    @property
    def columns(self) -> int:
        return self.shape[-1]


def gguf_name(name: str) -> str | None:
    """llama.cpp's name of a Llama or Qwen3 tensor, or None when there is none."""
    if name in _GLOBAL:
        return _GLOBAL[name]
    if name.startswith("model.layers."):
        number, _, rest = name.removeprefix("model.layers.").partition(".")
        if number.isdigit() and rest in _LAYER:
            return f"blk.{int(number)}.{_LAYER[rest]}"
    return None


def expected_shapes(model: Architecture) -> dict[str, tuple[int, ...]]:
    """Every weight such a model must have (biases are optional), with its shape, in the order they are written."""
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocabulary, model.hidden)}
    for layer in range(model.layers):
        block: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (model.hidden,),
            "self_attn.q_proj.weight": (q, model.hidden),
            "self_attn.k_proj.weight": (kv, model.hidden),
            "self_attn.v_proj.weight": (kv, model.hidden),
            "self_attn.o_proj.weight": (model.hidden, q),
            "post_attention_layernorm.weight": (model.hidden,),
            "mlp.gate_proj.weight": (model.feed_forward, model.hidden),
            "mlp.up_proj.weight": (model.feed_forward, model.hidden),
            "mlp.down_proj.weight": (model.hidden, model.feed_forward),
        }
        if model.name == "qwen3":
            block["self_attn.q_norm.weight"] = block["self_attn.k_norm.weight"] = (model.head_dim,)
        shapes |= {f"model.layers.{layer}.{rest}": shape for rest, shape in block.items()}
    shapes["model.norm.weight"] = (model.hidden,)
    if not model.tied:
        shapes["lm_head.weight"] = (model.vocabulary, model.hidden)
    return shapes


def plan_tensors(
    model: Checkpoint, architecture: Architecture, rows: ReadRows = read_rows
) -> list[PlannedTensor]:
    """All tensors of the checkpoint as they will be written, `rope_freqs.weight` first where there is one.

    `rows` reads rows of a tensor as float32; another reader can add deltas on the way.

    Raises BadModelError for a tensor that is missing, has another shape than config.json says, is not a float
    tensor, or has no place in the architecture.
    """
    expected = expected_shapes(architecture)
    for name, shape in expected.items():
        found = model.tensors.get(name)
        if found is None:
            raise BadModelError(f"{model.folder} has no tensor {name}, which config.json asks for")
        if found.shape != shape:
            raise BadModelError(
                f"{found.file}: {name} is {list(found.shape)}, and config.json makes it {list(shape)}"
            )
    order = [*expected, *sorted(name for name in model.tensors if name not in expected)]
    planned = []
    if architecture.rope.scaling == "llama3":
        factors = architecture.rope.frequency_factors(architecture.head_dim)
        planned.append(
            PlannedTensor("rope_freqs.weight", factors.shape, "computed", lambda: iter([factors[None]]))
        )
    for name in order:
        tensor = model.tensors[name]
        target = gguf_name(name)
        if name.endswith(_COMPUTED):
            continue
        if name == "lm_head.weight" and architecture.tied:
            _same_as_embedding(model, tensor)
            continue
        if target is None or (".layers." in name and int(name.split(".")[2]) >= architecture.layers):
            raise BadModelError(f"{tensor.file}: tensor {name} has no place in {architecture.name} as GGUF")
        if not tensor.is_float:
            raise BadModelError(
                f"{tensor.file}: {name} is {tensor.dtype}; only float weights can be written",
                "a quantised checkpoint must be dequantised first",
            )
        planned.append(
            PlannedTensor(
                target, tensor.shape, name, _blocks(tensor, heads_to_permute(name, architecture), rows)
            )
        )
    return planned


def heads_to_permute(name: str, architecture: Architecture) -> int:
    """How many heads the rows of this tensor are reordered by; 0 for most tensors."""
    if not architecture.permutes:
        return 0
    if ".self_attn.q_proj." in name:
        return architecture.heads
    return architecture.kv_heads if ".self_attn.k_proj." in name else 0


def permute_heads(rows: Float32Array, heads: int) -> Float32Array:
    """Reorder rows for llama.cpp's rotation: in each head of d rows, row i + j d/2 goes to 2 i + j (j = 0, 1).

    `rows` is (heads * d, columns). The inverse of what transformers' conversion of Llama weights does.
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)


def _blocks(tensor: TensorInfo, heads: int, rows: ReadRows) -> Callable[[], Iterator[Float32Array]]:
    def read() -> Iterator[Float32Array]:
        if len(tensor.shape) == 1:
            row = rows(tensor, 0, 1)
            if heads:
                row = permute_heads(row.reshape(-1, 1), heads).reshape(1, -1)
            yield row
            return
        step = max(1, BLOCK_ELEMENTS // tensor.columns)
        if heads:  # whole heads only: reordering stays inside them
            height = tensor.rows // heads
            step = max(height, step // height * height)
        for first in range(0, tensor.rows, step):
            count = min(step, tensor.rows - first)
            block = rows(tensor, first, count)
            yield permute_heads(block, count // height) if heads else block

    return read


def _same_as_embedding(model: Checkpoint, head: TensorInfo) -> None:
    """A tied model may still carry lm_head; it must equal the embedding, else the GGUF would be another model."""
    embedding = model.tensors["model.embed_tokens.weight"]
    step = max(1, BLOCK_ELEMENTS // embedding.columns)
    same = head.shape == embedding.shape and all(
        np.array_equal(
            read_rows(head, first, min(step, head.rows - first)),
            read_rows(embedding, first, min(step, head.rows - first)),
        )
        for first in range(0, head.rows, step)
    )
    if not same:
        raise BadModelError(
            f"{model.folder}: config.json ties lm_head to the embedding, and {head.file.name} holds another lm_head",
            "set tie_word_embeddings to false in config.json if the model was trained that way",
        )
