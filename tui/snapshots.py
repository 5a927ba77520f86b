"""What the screens show: immutable looks at files and jobs. No paths are opened here, nothing is computed.

The backend fills them in threads; widgets only read them. Text in them may come from foreign files: it is
made safe where it is shown (`tui.safe_text.plain`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine.template_check import Trained

LOSS_WORTH_SAYING = 0.02  # of a weight, as engine.merge.forecast has it


@dataclass(frozen=True)
class Selection:
    """What the person has chosen to work with; paths, "" when nothing. Kept between starts."""

    base: str = ""
    pt: str = ""
    sft: str = ""

    def labels(self) -> dict[str, str]:
        """Chosen adapters by label."""
        return {label: path for label, path in (("pt", self.pt), ("sft", self.sft)) if path}


@dataclass(frozen=True)
class ModelRow:
    """A model folder. `error` says why it cannot be used ("" when it can)."""

    path: str
    name: str
    architecture: str = ""
    dtype: str = ""
    parameters: int = 0
    layers: int = 0
    nbytes: int = 0
    error: str = ""


@dataclass(frozen=True)
class AdapterRow:
    """An adapter folder. `error`: not usable at all. `misfit`: usable, but not on the chosen base.
    `warning`: fits, but names another base."""

    path: str
    name: str
    kind: str = ""  # "pt", "sft" or "" (unknown)
    rank: int = 0
    scales: tuple[float, ...] = ()
    modules: int = 0
    targets: tuple[str, ...] = ()
    dtype: str = ""
    nbytes: int = 0
    base_name: str = ""
    template: str = ""
    trained: Trained | None = None  # the same with its text's hash, as warnings compare it
    trained_on: str = ""  # the base that training.json names with a hash
    same_base: bool | None = None  # whether that is the chosen base; None while the hashes are not compared
    error: str = ""
    hint: str = ""
    misfit: str = ""
    warning: str = ""
    variants: tuple[str, ...] = ()  # what it has besides plain low-rank pairs, in words

    @property
    def usable(self) -> bool:
        return not self.error and not self.misfit


@dataclass(frozen=True)
class AdapterDetail:
    """What reading the weights of one adapter shows, and what its training manifest says."""

    path: str
    norms: tuple[float, ...] = ()  # Frobenius norm of the delta of each layer
    not_finite: tuple[str, ...] = ()
    zero_b: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()  # (what, value) lines from training.json
    curve: tuple[tuple[float, float], ...] = ()  # (step, loss)
    error: str = ""


@dataclass(frozen=True)
class MergeRow:
    """A merge on disk with the verdict its manifest holds. `verdict` is None when it was not verified."""

    path: str
    name: str
    weights: tuple[tuple[str, float], ...] = ()
    method: str = ""
    dtype: str = ""
    nbytes: int = 0
    created: float = 0.0
    verdict: VerdictView | None = None
    base: str = ""  # path of what it was merged onto
    adapters: tuple[tuple[str, str], ...] = ()  # (label, path)
    by_tensor: bool = False  # a weight differs by tensor (selectors): one number does not say it
    error: str = ""
    kind: str = "checkpoint"  # or "adapter"
    rejected: bool = False  # its verification said no: kept for study as NAME.rejected
    parameters: tuple[tuple[str, str], ...] = ()  # those of the method: (name, value)
    manifest: bool = True  # medmerge.json says what was asked


class FindingView(NamedTuple):
    """One thing a verification found. `detail` is what it is about: a label, a factor, modules."""

    code: str
    message: str = ""
    detail: str = ""


@dataclass(frozen=True)
class ModuleView:
    """One module's own numbers. `error` is the error against that of one ideal rounding (1 is right)."""

    name: str
    elements: int = 0
    differing: int = 0
    unchanged: int = 0
    error: float | None = None
    residual: float | None = None
    found: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class VerdictView:
    """What verification says. `ok` is None when it could not tell. Weights by label."""

    ok: bool | None
    code: str
    message: str
    asked: dict[str, float] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)
    found: dict[str, float] = field(default_factory=dict)
    residual: float | None = None
    floor: float | None = None
    unchanged_share: float | None = None
    differing_share: float | None = None
    tensors: int = 0
    findings: tuple[FindingView, ...] = ()
    likely: dict[str, float] = field(default_factory=dict)  # nobody said weights: the round ones that fit
    loss: dict[str, float] = field(
        default_factory=dict
    )  # asked - expected: what rounding takes of each weight
    elements: int = 0
    differing: int = 0
    dtype: str = ""
    seconds: float | None = None
    warnings: tuple[str, ...] = ()
    worst: tuple[ModuleView, ...] = ()
    modules: tuple[ModuleView, ...] = ()


@dataclass(frozen=True)
class PlanView:
    """What a merge will cost, before it runs. Bytes and seconds; `fits` is False when the disk is too full.

    The header's numbers come at once; `measured` ones (seconds, memory, rounding loss) a moment later.
    """

    read: int
    written: int
    memory: int
    free: int
    touched: int
    copied: int
    seconds: float | None = None
    expected: dict[str, float] = field(default_factory=dict)  # weights the output dtype will keep
    lost: dict[str, float] = field(default_factory=dict)  # share of each weight that rounding takes, 0 to 1
    unchanged_share: float | None = None
    dtype: str = ""
    warnings: tuple[str, ...] = ()
    error: str = ""
    measured: bool = False

    @property
    def fits(self) -> bool:
        return self.free > self.written

    @property
    def too_coarse(self) -> dict[str, float]:
        """The adapters that rounding takes more than 2% of."""
        return {label: share for label, share in self.lost.items() if share > LOSS_WORTH_SAYING}


@dataclass(frozen=True)
class OverlapView:
    """How two adapters interfere: overall numbers and cosine per layer and kind of module."""

    cosine: float | None
    sign_conflict: float | None
    subspace: float | None
    norms: dict[str, float] = field(default_factory=dict)
    by_kind: tuple[tuple[str, tuple[float, ...]], ...] = ()  # ("q_proj", cosine per layer)


@dataclass(frozen=True)
class GgufRow:
    """A GGUF file, in gguf/ or beside the merge it was made with."""

    path: str
    name: str
    nbytes: int = 0
    kind: str = "model"  # "model" or "adapter"


@dataclass(frozen=True)
class JobRow:
    """One job as the lists show it. `fraction` is None while nothing is known of the end."""

    id: str
    kind: str
    title: str
    state: str
    created: float
    started: float | None = None
    finished: float | None = None
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    phase: str = ""
    message: str = ""
    rate: float | None = None
    eta_s: float | None = None
    exit_code: int | None = None
    error: str = ""
    hint: str = ""
    command: str = ""
    folder: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> bool:
        return self.state in ("done", "failed", "cancelled", "lost")

    @property
    def fraction(self) -> float | None:
        if self.state == "done":
            return 1.0
        return min(1.0, self.done / self.total) if self.total else None


@dataclass(frozen=True)
class JobFeed:
    """What a job's events have said so far."""

    curves: dict[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)  # name -> (step, value)
    latest: dict[str, float] = field(default_factory=dict)  # newest value of every series
    rows: tuple[dict[str, Any], ...] = ()
    log: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunRow:
    """A run folder. `kind`: train, eval or sweep; `cells`, `done` and `failed` count an evaluation's."""

    path: str
    name: str
    kind: str
    created: float = 0.0
    cells: int = 0
    done: int = 0
    failed: int = 0

    @property
    def evaluation(self) -> bool:
        return self.kind in ("eval", "sweep")


@dataclass(frozen=True)
class SampleRow:
    """One prompt with one answer, as stored; `text` is the answer without its think block (`thought`).

    right: None where nothing is right or wrong. label: of a probe's answer, `automatic` the one the rules give;
    they differ where a person corrected it (`by_hand`). score: of this sample alone, None while not computed.
    cell: the stored cell it is of. `options` are (text, log-likelihood or None) of multiple choice.
    """

    id: str
    prompt: str
    reference: str
    text: str
    facts: tuple[tuple[str, str], ...] = ()
    thought: str = ""
    think: str = "none"
    right: bool | None = None
    label: str = ""
    automatic: str = ""
    by_hand: bool = False
    score: float | None = None
    cell: str = ""
    seed: str = ""
    options: tuple[tuple[str, float | None], ...] = ()
    answer: int = -1
    chosen: int = -1

    @property
    def key(self) -> str:
        """The same for the same question (and seed) asked of another model."""
        return f"{self.id}\0{self.seed}"

    @property
    def reads(self) -> bool:
        """The model wrote nothing here: a text that is there was scored."""
        return any(what == "log-likelihood" for what, _ in self.facts)


@dataclass(frozen=True)
class SampleSet:
    """The samples behind one number. score: what `SampleRow.score` is, "" for nothing; `scored_by`: the overlap
    metric that can still be computed for each one."""

    model: str
    rows: tuple[SampleRow, ...] = ()
    score: str = ""
    scored_by: str = ""
    labelled: bool = False  # probes: labels can be corrected

    @property
    def by_hand(self) -> int:
        return sum(row.by_hand for row in self.rows)


@dataclass(frozen=True)
class TaskOffer:
    """A data set that can be measured: the entry of a config it makes, and how many rows it has (0: not counted).

    said: what a task file that the entry uses says. shipped: a probe set that comes with the program.
    """

    name: str
    path: str
    kind: str = ""
    rows: int = 0
    document: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    said: dict[str, Any] = field(default_factory=dict)
    shipped: bool = False

    def says(self, key: str) -> Any:
        """A setting of the entry, else of the file it uses; None when neither says it."""
        return self.document.get(key, self.said.get(key))


Points = tuple[tuple[float, float], ...]  # (step, value); a value that is not finite is a gap


@dataclass(frozen=True)
class TrainRun:
    """What a training run left on disk: its settings and curves. Of an adapter whose run folder is gone, or that came
    from elsewhere, `path` is the adapter's own folder and `resumable` is false."""

    path: str
    name: str
    kind: str = ""  # "pt", "sft" or "" (unknown)
    created: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Points] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    adapter: str = ""  # the finished adapter's folder, "" while there is none
    finished: float = 0.0  # when that appeared
    steps: int = 0  # planned, 0 when nothing says
    resumable: bool = False  # it has a checkpoint


class Piece(NamedTuple):
    """A part of a sample as the model sees it: consecutive tokens of one fate."""

    text: str
    trained: bool
    special: bool = False


@dataclass(frozen=True)
class SampleView:
    """One training sample, encoded. `length` and `trained` count tokens; `cut` those that the cutoff takes."""

    place: str
    length: int
    trained: int
    cut: int = 0
    pieces: tuple[Piece, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class PreviewView:
    """The first samples exactly as a run would see them, and what was counted over the rows looked at."""

    samples: tuple[SampleView, ...]
    template: str = ""
    cutoff: int = 0
    rows: int | None = None
    too_long: int | None = None
    untrained: int | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataFile:
    path: str
    name: str
    nbytes: int
    modified: float = 0.0


@dataclass(frozen=True)
class Overview:
    """Everything the workspace holds, read in one go."""

    root: str
    models: tuple[ModelRow, ...] = ()
    adapters: tuple[AdapterRow, ...] = ()
    merges: tuple[MergeRow, ...] = ()
    ggufs: tuple[GgufRow, ...] = ()
    runs: tuple[RunRow, ...] = ()
    data: tuple[DataFile, ...] = ()
    free: int = 0
    problems: tuple[str, ...] = ()

    def model(self, path: str) -> ModelRow | None:
        return next((row for row in self.models if row.path == path), None)

    def merge(self, path: str) -> MergeRow | None:
        return next((row for row in self.merges if row.path == path), None)

    def adapter(self, path: str) -> AdapterRow | None:
        return next((row for row in self.adapters if row.path == path), None)

    @property
    def usable_models(self) -> tuple[ModelRow, ...]:
        return tuple(row for row in self.models if not row.error)

    @property
    def usable_adapters(self) -> tuple[AdapterRow, ...]:
        return tuple(row for row in self.adapters if row.usable)
