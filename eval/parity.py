"""Does a runtime answer as the reference does? Comparisons of logits, and the gate an export must pass.

Three figures, each for one position (one row of logits) and then summed up over positions:

* relative error: ``max_v |candidate - reference| / sqrt(mean_v reference²)``. The largest difference is
  set against the row's root mean square, so that neither a model's logit scale nor one outlying logit
  (a maximum as denominator would be one) hides an error.
* KL divergence: ``KL(softmax(reference) ‖ softmax(candidate))`` in nats: what a sampler would notice.
* arg-max agreement: whether a greedy decoder would take the same token.

Everything is computed in float64. Rows, steps and positions count from 0 in every message.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import ConfigError, GateError

if TYPE_CHECKING:
    from losa_export.runtimes.base import Runtime

# A row of zeros has no scale; any difference from it is then reported as enormous, not as infinite.
_SMALLEST_SCALE = 1e-30


class ReferenceAnswers(Protocol):
    """What a runtime is held against: `losa_export.reference.Reference`, or another runtime's answers."""

    @property
    def prompts(self) -> tuple[NDArray[np.int64], ...]:
        """P arrays (S,) of equal length S."""
        ...

    @property
    def logits(self) -> NDArray[np.float32]:
        """(P, S, V), after each prompt token."""
        ...

    @property
    def greedy(self) -> NDArray[np.int64]:
        """(P, G), the greedy continuation; greedy[:, 0] follows the prompt's last token."""
        ...

    @property
    def decode_logits(self) -> NDArray[np.float32]:
        """(P, D, V), D < G: row d after prompt and greedy[:, : d + 1]."""
        ...

    @property
    def greedy_margin(self) -> NDArray[np.float32]:
        """(P, G), top-1 minus top-2 logit where each greedy token was chosen."""
        ...


@dataclass(frozen=True)
class PositionErrors:
    """Figures of each position.

    Attributes:
        relative: (P,) float64, relative error.
        absolute: (P,) float64, largest absolute difference.
        kl: (P,) float64, nats, at least 0.
        agree: (P,) bool, same arg-max.
        worst_token: (P,) int64, token id of the largest difference.
    """

    relative: NDArray[np.float64]
    absolute: NDArray[np.float64]
    kl: NDArray[np.float64]
    agree: NDArray[np.bool_]
    worst_token: NDArray[np.int64]

    def only(self, chosen: NDArray[np.bool_]) -> PositionErrors:
        """Those of some positions: `chosen` is (P,)."""
        return PositionErrors(*(getattr(self, field.name)[chosen] for field in fields(self)))


@dataclass(frozen=True)
class ParityFigures:
    """The figures of one comparison, over all its positions."""

    positions: int
    max_relative_error: float
    max_absolute_error: float
    kl_mean: float
    kl_max: float
    argmax_agreement: float


@dataclass(frozen=True)
class GateThresholds:
    """What still counts as the same answer. The defaults are for fp32 weights and fp32 arithmetic.

    Two correct fp32 runtimes sum in different orders; through 30 layers that leaves relative errors of
    about 1e-5 to 1e-4 and a KL below 1e-8. A wrong rope base, a missing bias or one swapped head gives
    a relative error above 1e-1. The defaults stand between the two.

    Attributes:
        max_relative_error: largest relative error of any position.
        max_kl: largest KL(reference ‖ candidate) of any position, nats.
        tie_margin: a different arg-max is tolerated, and reported, only where the reference's own top-1
            logit leads its top-2 by at most this fraction of the row's root mean square: its choice
            there is rounding, not an answer.
        stray_share: of the positions of each section this share, if it is not 0 at least one position, may differ by
            more. Some tokens stand on an edge, from which any rounding tips them into another answer.
    """

    max_relative_error: float = 1e-3
    max_kl: float = 1e-5
    tie_margin: float = 2e-4
    stray_share: float = 0.0

    def __post_init__(self) -> None:
        for field in ("max_relative_error", "max_kl", "tie_margin", "stray_share"):
            value = getattr(self, field)
            if not (np.isfinite(value) and value >= 0):
                raise ConfigError(f"GateThresholds.{field} is {value}; give a finite number of at least 0", field=field)

    def diverge(self, errors: PositionErrors) -> NDArray[np.bool_]:
        """Which positions differ by more than they may: (P,) bool."""
        return (errors.relative > self.max_relative_error) | (errors.kl > self.max_kl)

    def strays(self, positions: int) -> int:
        """How many of a section's positions may diverge; never all of them."""
        return min(max(1, int(self.stray_share * positions)), positions - 1) if self.stray_share else 0


@dataclass(frozen=True)
class ToleratedFlip:
    """A step where the runtime's top token differs from the reference's, at a tie of the reference or as a stray."""

    prompt: int
    step: int
    expected: int
    got: int
    reference_margin: float


@dataclass(frozen=True)
class GreedyFigures:
    """Outcome of the greedy continuation: `tokens` compared, `equal` of them the same."""

    tokens: int
    equal: int
    tolerated: tuple[ToleratedFlip, ...]


@dataclass(frozen=True)
class Stray:
    """An output that diverges, and was let pass since few do.

    Attributes:
        where: section, prompt and step.
        kl: KL(reference ‖ candidate), nats.
    """

    where: str
    kl: float


@dataclass(frozen=True)
class GateReport:
    """A passed gate, with figures of all positions but the strays. `as_dict` gives what `export.json` stores."""

    runtime: str
    prompts: int
    prompt_tokens: int
    prefill: ParityFigures
    decode: ParityFigures
    batch3: ParityFigures
    greedy: GreedyFigures
    strays: tuple[Stray, ...]
    thresholds: GateThresholds

    def as_dict(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists and numbers, ready for `json.dumps`."""
        return asdict(self)


def log_softmax(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Logarithm of the softmax over the last axis, in float64, shifted by the maximum (no overflow)."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def position_errors(reference: NDArray[np.floating[Any]], candidate: NDArray[np.floating[Any]]) -> PositionErrors:
    """Compare two stacks of logits position by position.

    Args:
        reference: (..., V) finite logits; the leading axes are flattened to P positions.
        candidate: same shape, finite.

    Raises:
        GateError: the shapes differ, or a value is NaN or infinite.
    """
    if reference.shape != candidate.shape:
        raise GateError(
            f"logits have shape {candidate.shape}, the reference has {reference.shape}; "
            "both must come from the same prompt and vocabulary",
            shape=candidate.shape,
            expected=reference.shape,
        )
    for owner, logits in (("the reference", reference), ("the runtime", candidate)):
        _require_finite(logits, owner)
    a = reference.reshape(-1, reference.shape[-1]).astype(np.float64)
    b = candidate.reshape(-1, candidate.shape[-1]).astype(np.float64)
    difference = np.abs(b - a)
    scale = np.maximum(np.sqrt(np.mean(a * a, axis=1)), _SMALLEST_SCALE)
    absolute = difference.max(axis=1)
    log_a, log_b = log_softmax(a), log_softmax(b)
    kl = np.sum(np.exp(log_a) * (log_a - log_b), axis=1)
    return PositionErrors(
        relative=absolute / scale,
        absolute=absolute,
        kl=np.maximum(kl, 0.0),  # rounding alone can leave -1e-17
        agree=a.argmax(axis=1) == b.argmax(axis=1),
        worst_token=difference.argmax(axis=1).astype(np.int64),
    )


def compare(reference: NDArray[np.floating[Any]], candidate: NDArray[np.floating[Any]]) -> ParityFigures:
    """The figures of `candidate` against `reference`, both (..., V), over all positions.

    Raises:
        GateError: see `position_errors`.
    """
    return summarise([position_errors(reference, candidate)])


def summarise(parts: list[PositionErrors]) -> ParityFigures:
    """One set of figures over all positions of all `parts` (at least one position)."""
    kl = np.concatenate([part.kl for part in parts])
    return ParityFigures(
        positions=len(kl),
        max_relative_error=float(max(part.relative.max() for part in parts)),
        max_absolute_error=float(max(part.absolute.max() for part in parts)),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        argmax_agreement=float(np.concatenate([part.agree for part in parts]).mean()),
    )


def thresholds_for(activations: str | None) -> GateThresholds:
    """What still counts as the same answer between engines of which one rounds activations for int8 and int4 weights.

    Rounding to 16 bits leaves errors of some 2e-3 and a KL of 1e-6 on SmolLM2-135M's own text, and up to 1.5e-2 and
    1.5e-4 on random tokens, whose activations have larger outliers; so a wrong graph still stands out.
    To 8 bits it leaves 0.4 and 0.08: then only gross errors do, and the kernels' own tests must speak for the rest.
    Of random tokens half a percent to 2 % then differ by more than 0.3 nats, often several of one prompt; rounding int8
    weights alone tips 0.3 % over (docs/decisions/0007-outliers-move-into-weights.md).

    Args:
        activations: 'int16', 'int8', or None where none are rounded; as in export.json.
    """
    if activations == "int16":
        return GateThresholds(max_relative_error=5e-2, max_kl=1e-3, tie_margin=1e-2)
    if activations == "int8":
        return GateThresholds(max_relative_error=2.0, max_kl=0.5, tie_margin=0.3, stray_share=0.125)
    return GateThresholds()


def gate(reference: ReferenceAnswers, runtime: Runtime, thresholds: GateThresholds | None = None) -> GateReport:
    """Hold a runtime against the reference: prefill, decode with a past, a batch, and greedy tokens.

    Decoding is fed the reference's own greedy tokens. As long as the runtime picks the same ones this
    is its free greedy run; after a tolerated tie it keeps the two comparable.

    Args:
        reference: at least one prompt, two greedy tokens and one decode step.
        runtime: any loaded runtime; its states are made here.
        thresholds: what counts as equal; None for the fp32 defaults.

    Returns:
        Figures of each section; every section has passed.

    Raises:
        GateError: names the first diverging output ("prefill of prompt 1, position 7") with its
            figures; also for logits of a wrong shape, NaN or infinity, or an empty reference.
    """
    limits = thresholds or GateThresholds()
    rows = len(reference.prompts)
    if rows == 0 or reference.greedy.shape[1] < 2 or reference.decode_logits.shape[1] == 0:
        raise GateError(
            "the reference holds no prompts or no decode steps, so nothing could be proved by it; "
            "compute it again from the checkpoint"
        )
    prompt_tokens = len(reference.prompts[0])
    steps = reference.decode_logits.shape[1]
    capacity = prompt_tokens + reference.greedy.shape[1]
    in_prompts, in_decode, in_fill, in_batch = (
        _Checker(limits, runtime.name, positions)
        for positions in (rows * prompt_tokens, rows * steps, rows, rows * steps)
    )

    for prompt in range(rows):
        state = runtime.new_state(1, capacity)
        logits = runtime.prefill(state, 0, reference.prompts[prompt])
        in_prompts.check(
            reference.logits[prompt],
            logits,
            [f"prefill of prompt {prompt}, position {position}" for position in range(prompt_tokens)],
        )
        for step in range(steps):
            logits = runtime.decode(state, reference.greedy[prompt : prompt + 1, step])
            in_decode.check(
                reference.decode_logits[prompt, step : step + 1],
                logits,
                [f"decode with past of prompt {prompt}, step {step}"],
            )

    greedy = _Greedy(reference, limits, runtime.name)
    state = runtime.new_state(rows, capacity)
    last = np.stack([runtime.prefill(state, row, reference.prompts[row])[-1] for row in range(rows)])
    # Filling row 1 must not disturb row 0, nor may a row above 0 be filled wrongly.
    in_fill.check(
        reference.logits[:, -1],
        last,
        [f"prefill of prompt {row} into row {row} of a batch of {rows}, last position" for row in range(rows)],
    )
    greedy.step(0, last)
    for step in range(reference.greedy.shape[1] - 1):
        logits = runtime.decode(state, reference.greedy[:, step])
        if step < steps:
            in_batch.check(
                reference.decode_logits[:, step],
                logits,
                [f"decode in a batch of {rows}, step {step}, row {row}" for row in range(rows)],
            )
        greedy.step(step + 1, logits)

    return GateReport(
        runtime=runtime.name,
        prompts=rows,
        prompt_tokens=prompt_tokens,
        prefill=summarise(in_prompts.errors),
        decode=summarise(in_decode.errors),
        batch3=summarise(in_batch.errors),
        greedy=greedy.figures(),
        strays=tuple(stray for part in (in_prompts, in_decode, in_fill, in_batch) for stray in part.strays),
        thresholds=limits,
    )


def deviation(reference: ReferenceAnswers, runtime: Runtime) -> ParityFigures:
    """How far a runtime's answers are from the reference's, without judging.

    For a runtime whose weights were rounded, `gate` against the unrounded model means nothing; this says what the
    rounding costs. Each prompt is read together with the greedy tokens whose logits the reference holds.

    Raises:
        GateError: logits of a wrong shape, NaN or infinite.
    """
    steps = reference.decode_logits.shape[1]
    answers = []
    for prompt, continuation in zip(reference.prompts, reference.greedy, strict=True):
        text = np.concatenate([prompt, continuation[:steps]])
        answers.append(runtime.prefill(runtime.new_state(1, len(text)), 0, text))
    return compare(np.concatenate([reference.logits, reference.decode_logits], axis=1), np.stack(answers))


class _Checker:
    """Compares the positions of a section in the order they were computed, and raises where too many diverge.

    Attributes:
        errors: of what was compared so far, but for the strays.
        strays: what diverged and was let pass.
    """

    def __init__(self, limits: GateThresholds, runtime: str, positions: int) -> None:
        self.errors: list[PositionErrors] = []
        self.strays: list[Stray] = []
        self._limits = limits
        self._runtime = runtime
        self._most_strays = limits.strays(positions)

    def check(
        self,
        reference: NDArray[np.floating[Any]],
        candidate: NDArray[np.floating[Any]],
        places: list[str],
    ) -> None:
        """Hold (P, V) logits against the reference's; `places` names the P positions."""
        if candidate.shape != reference.shape:
            raise GateError(
                f"runtime '{self._runtime}' gives logits of shape {candidate.shape} at {places[0]}, "
                f"the reference has {reference.shape}; the vocabulary or the prompt length differs",
                where=places[0],
            )
        for place, logits in zip(places, candidate, strict=True):
            _require_finite(logits, f"runtime '{self._runtime}'", place)
        errors = position_errors(reference, candidate)
        limits = self._limits
        diverge = limits.diverge(errors)
        self.errors.append(errors.only(~diverge))
        for index in np.flatnonzero(diverge):
            relative, kl = float(errors.relative[index]), float(errors.kl[index])
            if len(self.strays) < self._most_strays:
                self.strays.append(Stray(places[index], kl))
                continue
            token = int(errors.worst_token[index])
            first = f"after {self._most_strays} that may, the next" if self._most_strays else "the first"
            raise GateError(
                f"runtime '{self._runtime}' does not answer as the reference: {first} output that "
                f"diverges is {places[index]}, token {token} "
                f"({float(candidate[index, token]):.6g} instead of {float(reference[index, token]):.6g}): "
                f"relative error {relative:.3g} (limit {limits.max_relative_error:.3g}), "
                f"KL {kl:.3g} (limit {limits.max_kl:.3g}), "
                f"arg-max {'agrees' if errors.agree[index] else 'differs'}",
                where=places[index],
                token=token,
                relative_error=relative,
                kl=kl,
            )


class _Greedy:
    """Counts equal greedy tokens, tolerating a flip only at a tie of the reference, or as one of few strays."""

    def __init__(self, reference: ReferenceAnswers, limits: GateThresholds, runtime: str) -> None:
        self._reference = reference
        self._runtime = runtime
        last = reference.logits[:, -1].astype(np.float64)
        # One scale for each prompt: logits of later steps are not all stored, their scale hardly moves.
        self._tie = limits.tie_margin * np.sqrt(np.mean(last * last, axis=1))
        self._strays_left = limits.strays(reference.greedy.size)
        self._tolerated: list[ToleratedFlip] = []
        self._tokens = 0

    def step(self, step: int, logits: NDArray[np.floating[Any]]) -> None:
        """Hold the arg-max of `logits` (P, V) against the reference's greedy token `step`."""
        for row, line in enumerate(logits):
            _require_finite(line, f"runtime '{self._runtime}'", f"greedy token {step}, row {row}")
            got, expected = int(np.argmax(line)), int(self._reference.greedy[row, step])
            self._tokens += 1
            if got == expected:
                continue
            margin = float(self._reference.greedy_margin[row, step])
            if not margin <= self._tie[row]:
                self._strays_left -= 1
            if self._strays_left < 0:
                raise GateError(
                    f"runtime '{self._runtime}' does not continue as the reference: the first output that "
                    f"diverges is greedy token {step}, row {row}: token {got} instead of {expected}, where "
                    f"the reference's top token leads by {margin:.3g} (a tie is at most "
                    f"{self._tie[row]:.3g})",
                    where=f"greedy token {step}, row {row}",
                    token=got,
                    expected=expected,
                    margin=margin,
                )
            self._tolerated.append(ToleratedFlip(row, step, expected, got, margin))

    def figures(self) -> GreedyFigures:
        return GreedyFigures(self._tokens, self._tokens - len(self._tolerated), tuple(self._tolerated))


def _require_finite(logits: NDArray[np.floating[Any]], owner: str, where: str = "") -> None:
    if np.isfinite(logits).all():
        return
    kind = "NaN" if np.isnan(logits).any() else "infinite"
    token = int(np.argmax(~np.isfinite(logits.reshape(-1)))) % logits.shape[-1]
    raise GateError(
        f"{owner} gives {kind} logits{f' at {where}' if where else ''} (first: token {token}); "
        "a weight or a kernel is broken, or a value left the range of its type",
        where=where,
        token=token,
    )
