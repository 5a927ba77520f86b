"""The mergekit configs whose results are compared: one per method, plus filters, gradients, slices and LoRA pairs.

Each is a config as a user writes it; paths are relative to the folder of the inputs.
"""

from __future__ import annotations

CASES: dict[str, str] = {
    "linear": """
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.3}}
  - {model: b, parameters: {weight: 0.5}}
dtype: bfloat16
""",
    "linear_filters": """
merge_method: linear
models:
  - model: a
    parameters:
      weight:
        - {filter: self_attn, value: [0.0, 0.5, 1.0]}
        - {filter: mlp, value: 0.25}
        - {value: [0.75, 0.1]}
  - model: b
    parameters: {weight: 1.0}
dtype: bfloat16
""",
    "slerp": """
merge_method: slerp
base_model: a
slices:
  - sources:
      - {model: a, layer_range: [0, 3]}
      - {model: b, layer_range: [0, 3]}
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - {value: 0.5}
dtype: bfloat16
""",
    "task_arithmetic": """
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 0.6}}
  - {model: b, parameters: {weight: [0.2, 0.9]}}
parameters: {lambda: 1.5}
dtype: float32
""",
    "task_arithmetic_bf16": """
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 0.6}}
  - {model: b, parameters: {weight: 0.3}}
dtype: bfloat16
""",
    "ties": """
merge_method: ties
base_model: base
models:
  - {model: base}
  - {model: a, parameters: {weight: 1.0, density: 0.53}}
  - {model: b, parameters: {weight: 0.7, density: [0.3, 0.8]}}
parameters: {normalize: true, int8_mask: true}
dtype: float32
""",
    "ties_bf16": """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.5, density: 0.5}}
  - {model: b, parameters: {weight: 0.5, density: 0.5}}
parameters: {normalize: false, lambda: 0.8}
dtype: bfloat16
""",
    "dare_ties": """
merge_method: dare_ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.6, density: 1.0}}
  - {model: b, parameters: {weight: 0.4, density: 1.0}}
parameters: {normalize: true}
dtype: float32
""",
    "dare_linear": """
merge_method: dare_linear
base_model: base
models:
  - {model: a, parameters: {weight: 0.6, density: 0.5}}
  - {model: b, parameters: {weight: 0.0, density: 0.5}}
dtype: float32
""",
    "vocabulary": """
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: c, parameters: {weight: 0.25}}
tokenizer_source: base
dtype: float32
""",
    "lora": """
merge_method: task_arithmetic
base_model: base
models:
  - {model: base+pt, parameters: {weight: 0.3}}
  - {model: base+sft, parameters: {weight: 0.7}}
dtype: bfloat16
""",
    "lora_slerp": """
merge_method: slerp
base_model: base+pt
models:
  - {model: base+sft}
parameters: {t: [0.25, 0.75]}
dtype: bfloat16
""",
}
