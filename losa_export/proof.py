"""Proof of a merge: what was written is what was meant, and answers as before.

Everything here reads the *written* files again; nothing is taken from the memory of the merge itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from losa_export.checkpoint import Checkpoint
from losa_export.errors import MergeProofError
from losa_export.masks import BoolArray, digest
from losa_export.peft_adapter import Adapter
from losa_export.reference import Reference

FloatArray = NDArray[np.float32]

# Property P1: exact cancellation W = −s·BA in float32 is possible, but rarer than one weight in ten million.
MAX_LOST_FRACTION = 1e-6
# Property P2. Far below any change of the function. Rounding of a whole float32 pass comes near it in deep models
# (7e-6 with 30 blocks); in float64 what remains is the one rounding of the merged weights, some 1e-7.
MAX_RELATIVE_ERROR = 1e-5

ReadMask = Callable[[str], BoolArray]


@dataclass(frozen=True)
class TensorProof:
    """What was found in one written tensor that has a mask.

    Attributes:
        shape: (out, in).
        pruned: positions outside the mask; all are exactly +0.0.
        kept_zeros: kept positions that are zero all the same.
        lost: kept positions that are zero although the base weight was not.
        mask_sha256: `masks.digest` of the mask, read back from the output.
    """

    shape: tuple[int, ...]
    pruned: int
    kept_zeros: int
    lost: int
    mask_sha256: str

    @property
    def size(self) -> int:
        """Number of positions."""
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class LogitProof:
    """Logits of the merged model against base, mask and adapter kept apart.

    Attributes:
        max_relative_error: the largest, over positions, of ‖after − before‖₂ / ‖before‖₂.
        max_absolute_error: the largest difference of any logit.
        argmax_agreement: fraction of positions with the same arg-max.
        positions: how many were compared.
        dtype: of the passes compared.
    """

    max_relative_error: float
    max_absolute_error: float
    argmax_agreement: float
    positions: int
    dtype: str


def prove_tensors(
    base: Checkpoint, written: Checkpoint, masks: dict[str, ReadMask], written_mask: ReadMask, changed: frozenset[str]
) -> dict[str, TensorProof]:
    """Hold every written tensor against its base and its mask, one at a time.

    Args:
        base: the checkpoint before the merge, with the weights that the run changed, if any.
        written: the merged checkpoint, opened again.
        masks: weight name → reader of the mask that the merge was asked to keep.
        written_mask: reads a mask from the masks file of the output.
        changed: names of tensors without a mask that an adapter was folded into.
    Returns: weight name → what was found, for every masked weight.
    Raises: MergeProofError if a pruned position is not +0.0, a mask or an unrelated tensor changed, a value is
        not finite, a tensor is missing or new, or more kept weights were lost than rounding explains.
    """
    if base.names() != written.names():
        different = sorted(set(base.names()) ^ set(written.names()))
        raise MergeProofError(
            f"the merged checkpoint and its base do not hold the same tensors (for example '{different[0]}'); "
            "this is a defect, nothing was written",
            tensors=different,
        )
    proofs = {}
    for name in base.names():
        before, after = base.read(name), written.read(name)
        if name in masks:
            proofs[name] = prove_tensor(name, before, after, masks[name](name), written_mask(name))
        elif name in changed:
            _require_finite(name, after)
        elif before.tobytes() != after.tobytes():
            raise MergeProofError(
                f"tensor '{name}' has neither mask nor adapter, but changed in the merge; nothing was written",
                tensor=name,
            )
    lost, kept = (
        sum(proof.lost for proof in proofs.values()),
        sum(proof.size - proof.pruned for proof in proofs.values()),
    )
    if lost > MAX_LOST_FRACTION * kept:
        worst = max(proofs, key=lambda name: proofs[name].lost)
        raise MergeProofError(
            f"the merge would lose {lost} of {kept} kept weights (most in '{worst}'); at most a fraction of "
            f"{MAX_LOST_FRACTION:g} may cancel by rounding: check that adapter and base belong together",
            lost=lost,
            kept=kept,
        )
    return proofs


def prove_tensor(
    name: str, before: FloatArray, after: FloatArray, keep: BoolArray, written_keep: BoolArray
) -> TensorProof:
    """Hold one merged weight against its base weight and its mask.

    Args:
        name: for messages.
        before: (out, in) base weight, dense or already sparse.
        after: (out, in) merged weight, as read back.
        keep: (out, in) the mask asked for.
        written_keep: (out, in) the mask as read back.
    Raises: MergeProofError as `prove_tensors`; lost weights are only counted here.
    """
    if digest(written_keep) != digest(keep):
        raise MergeProofError(
            f"the mask of '{name}' in the output is not the one of the input; nothing was written", tensor=name
        )
    _require_finite(name, after)
    # compared as bits: −0.0 equals 0.0, but is not the zero that was promised
    awake = int(np.count_nonzero(np.ascontiguousarray(after).view(np.uint32)[~keep]))
    if awake:
        raise MergeProofError(
            f"{awake} pruned positions of '{name}' are not exactly zero after the merge; nothing was written",
            tensor=name,
            awake=awake,
        )
    kept_zero = keep & (after == 0)
    return TensorProof(
        shape=after.shape,
        pruned=int(keep.size - np.count_nonzero(keep)),
        kept_zeros=int(np.count_nonzero(kept_zero)),
        lost=int(np.count_nonzero(kept_zero & (before != 0))),
        mask_sha256=digest(written_keep),
    )


def _require_finite(name: str, weight: FloatArray) -> None:
    if not np.isfinite(weight).all():
        raise MergeProofError(
            f"merged weight '{name}' holds values that are not finite; check the base checkpoint and the adapter",
            tensor=name,
        )


def prove_logits(
    base: Checkpoint, masks: dict[str, ReadMask], adapter: Adapter | None, merged: Path, reference: Reference
) -> LogitProof:
    """Show that the merged folder, in plain transformers, answers as base, mask and adapter do.

    Compared in float32 first. Should that fail, the passes are repeated in float64, which tells rounding from
    a change of the function.

    Args:
        base: the checkpoint before the merge.
        masks: weight name → reader of its mask.
        adapter: or None.
        merged: folder of the merged checkpoint.
        reference: the merged model's float32 answers.
    Raises: MergeProofError if the relative error exceeds `MAX_RELATIVE_ERROR` in float64 too.
    """
    proof = compare_logits(unmerged_logits(base, masks, adapter, reference.prompts), reference.logits)
    if not proof.max_relative_error <= MAX_RELATIVE_ERROR:  # so that NaN fails too
        from losa_export.streamed import load_streamed

        before = unmerged_logits(base, masks, adapter, reference.prompts, dtype="float64")
        proof = compare_logits(before, _logits(load_streamed(merged, "float64"), reference.prompts))
    if not proof.max_relative_error <= MAX_RELATIVE_ERROR:
        raise MergeProofError(
            f"the merged model answers differently: relative error of its logits {proof.max_relative_error:.2e}, "
            f"at most {MAX_RELATIVE_ERROR:g} is rounding; nothing was written",
            max_relative_error=proof.max_relative_error,
        )
    return proof


def compare_logits(before: NDArray[np.floating[Any]], after: NDArray[np.floating[Any]]) -> LogitProof:
    """Figures of two sets of logits, both (..., V) of one dtype, over all positions. Computed in float64."""
    first = before.reshape(-1, before.shape[-1]).astype(np.float64)
    second = after.reshape(-1, after.shape[-1]).astype(np.float64)
    scale = np.maximum(np.linalg.norm(first, axis=1), np.finfo(np.float64).tiny)
    return LogitProof(
        max_relative_error=float((np.linalg.norm(second - first, axis=1) / scale).max()),
        max_absolute_error=float(np.abs(second - first).max()),
        argmax_agreement=float(np.mean(first.argmax(axis=1) == second.argmax(axis=1))),
        positions=first.shape[0],
        dtype=str(after.dtype),
    )


def unmerged_logits(
    base: Checkpoint,
    masks: dict[str, ReadMask],
    adapter: Adapter | None,
    prompts: Sequence[NDArray[np.int64]],
    *,
    dtype: str = "float32",
) -> NDArray[np.floating[Any]]:
    """Logits of base, mask and adapter kept apart: y = x(W⊙M)ᵀ + s·x((BA)⊙M)ᵀ.

    The base is run by plain transformers, block after block, each with its weights as the run changed them, if it
    did, under their masks; the second product is added by forward hooks, so none of the merge's own arithmetic is
    used.

    Args:
        base: the checkpoint before the merge.
        masks: weight name → reader of its mask.
        adapter: or None.
        prompts: arrays (S,) of equal length.
        dtype: of weights and activations, 'float32' or 'float64'.
    Returns: (prompts, S, V) of that dtype.
    """
    import torch

    from losa_export.streamed import load_outline, stream_blocks

    kind: torch.dtype = getattr(torch, dtype)

    def masked(name: str) -> torch.Tensor:
        weight: torch.Tensor = base.mapped(name).to(kind)
        # Not bool: PyTorch multiplies floats by bool some thirty times slower.
        return weight * torch.from_numpy(masks[name](name).view(np.uint8)) if name in masks else weight

    model = load_outline(base.folder, kind, "eager")
    with torch.inference_mode():
        for name in sorted({*base.replaced, *masks, *(adapter.names if adapter else ())}):
            layer: Any = model.get_submodule(name.removesuffix(".weight"))
            if not layer.weight.is_meta:
                layer.weight.copy_(masked(name))
            if adapter is not None and name in adapter:
                update = adapter.read(name, base.shape(name))
                a, b = (torch.from_numpy(factor).to(kind) for factor in (update.a, update.b))
                layer.register_forward_hook(_second_product(a, b, update.scaling, name, masks.get(name)))
    stream_blocks(model, masked)
    return _logits(model, prompts)


def _second_product(a: Any, b: Any, scaling: float, name: str, read_mask: ReadMask | None) -> Callable[..., Any]:
    """A forward hook that adds s·x((BA)⊙M)ᵀ; delta and mask live only while the layer runs."""

    def hook(_module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        import torch

        delta = b @ a
        if read_mask is not None:
            delta.mul_(torch.from_numpy(read_mask(name).view(np.uint8)))
        return output + scaling * (inputs[0] @ delta.T)

    return hook


def _logits(model: Any, prompts: Sequence[NDArray[np.int64]]) -> NDArray[np.floating[Any]]:
    import torch

    with torch.inference_mode():
        logits: NDArray[np.floating[Any]] = model(input_ids=torch.from_numpy(np.stack(prompts))).logits.numpy()
    return logits
