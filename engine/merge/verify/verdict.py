"""What verification says: findings with codes for scripts, and a sentence for people."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Codes that mean "could not tell" (exit 4). Every other code but `ok` means no (exit 1).
UNSURE = ("not_identifiable", "not_checkable")


@dataclass(frozen=True)
class Finding:
    """One thing found. `detail` is what the code is about (a label, a factor, modules); `message` a sentence."""

    code: str
    detail: str = ""
    message: str = ""

    def to_json(self) -> dict[str, str]:
        return {"code": self.code, "detail": self.detail, "message": self.message}


Weights = dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """The answer to both questions: is it what was asked, and which weights are in there.

    Shares are of the elements of touched tensors. `residual` and `rounding_floor` are
    ||D - fit|| / ||D||, for the merge found and for the ideally rounded one.
    """

    findings: tuple[Finding, ...]
    message: str
    asked: Weights | None
    expected_weights: Weights | None
    effective_weights: Weights | None
    rounding_loss: Weights | None
    residual: float | None
    rounding_floor: float | None
    differing_share: float
    unchanged_share: float
    elements_checked: int = 0
    elements_differing: int = 0
    tensors_checked: int = 0
    tensors_unexpected: tuple[str, ...] = ()
    tensors_wrong: tuple[str, ...] = ()
    per_module: tuple[dict[str, Any], ...] = ()
    worst: tuple[dict[str, Any], ...] = ()  # of per_module, those farthest from what was asked
    method: str = "linear"
    cosine: dict[str, float] = field(default_factory=dict)
    dtype: str = ""
    warnings: tuple[str, ...] = ()
    guessed: Weights | None = None  # weights=None: the round weights the elements were judged by
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """The leading finding's code."""
        return self.findings[0].code

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"

    @property
    def exit_code(self) -> int:
        """0 ok, 1 the check says no, 4 it could not tell. A definite no outweighs a doubt."""
        if self.ok:
            return 0
        return 4 if all(finding.code in UNSURE for finding in self.findings) else 1

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON; the keys of the command-line contract are always there."""
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "message": self.message,
            "findings": [finding.to_json() for finding in self.findings],
            "asked": self.asked,
            "expected_weights": self.expected_weights,
            "effective_weights": self.effective_weights,
            "rounding_loss": self.rounding_loss,
            "residual": self.residual,
            "rounding_floor": self.rounding_floor,
            "differing_share": self.differing_share,
            "unchanged_share": self.unchanged_share,
            "elements_checked": self.elements_checked,
            "elements_differing": self.elements_differing,
            "tensors_checked": self.tensors_checked,
            "tensors_unexpected": list(self.tensors_unexpected),
            "tensors_wrong": list(self.tensors_wrong),
            "per_module": list(self.per_module),
            "worst": list(self.worst),
            "method": self.method,
            "cosine": self.cosine,
            "dtype": self.dtype,
            "warnings": list(self.warnings),
            "guessed_weights": self.guessed,
            "seconds": round(self.seconds, 3),
            "exit_code": self.exit_code,
        }
