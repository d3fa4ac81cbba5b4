"""The masked low-rank layer: y = x·((W + s·BA)⊙M)ᵀ + b, with W and M frozen."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from losa_export.errors import ConfigError, MaskError
from losa_export.training.shares import Shares, overwrite_rows, whole


def effective_weight(weight: Tensor, mask: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """(W + s·BA)⊙M, as a new tensor.

    Args:
        weight: (out, in), any float dtype.
        mask: (out, in) uint8, 1 = keep. Not bool: PyTorch multiplies floats by bool some thirty times slower.
        a: (rank, in), the dtype of the result.
        b: (out, rank), likewise.
        scaling: s.
    Returns: (out, in) in the dtype of `a`; pruned positions are zero.
    """
    if weight.dtype == a.dtype:
        merged = torch.addmm(weight, b, a, alpha=scaling)
    else:
        merged = weight.to(a.dtype).addmm_(b, a, alpha=scaling)
    return merged.mul_(mask)


Operator = Literal["exact", "exact_bf16", "lors"]

# An effective weight with at most so many times the elements of the layer's input is kept for the backward pass.
_KEPT_BESIDE_INPUT = 2


class _MaskedLoRAFunction(torch.autograd.Function):
    """One matrix product forward; backward two with exact gradients, or one with those of LoRS.

    Only x, A, B and references to W and M are kept; the effective weight is built again in `backward`, unless it is
    small beside x. What is kept then is still less than with unmerged adapters, which keep activations of their own.
    The exact gradients are ∂A = s·Bᵀ(G⊙M) and ∂B = s·(G⊙M)Aᵀ with G = gᵀx, g the gradient of the output. "exact_bf16"
    takes all three products in bfloat16, as is done whenever x is that. "lors" drops M, so that G, as large as W, is
    never formed: ∂A = s·(gB)ᵀx and ∂B = s·gᵀ(xAᵀ). Under a mask that prunes nothing these are the exact ones, and are
    taken whatever the operator.

    Source: of "lors", LoRS, arXiv:2501.08582.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        scaling: float,
        operator: Operator,
        prunes: bool,
    ) -> Tensor:
        ctx.scaling, ctx.operator, ctx.masked = scaling, operator, prunes and operator != "lors"
        with torch.autocast(x.device.type, enabled=False):
            merged = effective_weight(whole(weight), whole(mask), a, b, scaling).to(x.dtype)
            kept = merged if mask.numel() <= _KEPT_BESIDE_INPUT * x.numel() else None
            ctx.save_for_backward(x, a, b, weight, mask, kept)
            return functional.linear(x, merged, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, weight, mask, merged = ctx.saved_tensors
        grad_x = grad_a = grad_b = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.masked or merged is None:
                mask = whole(mask)
            if ctx.needs_input_grad[0]:
                if merged is None:
                    merged = effective_weight(whole(weight), mask, a, b, ctx.scaling).to(x.dtype)
                grad_x = grad_output @ merged
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                rows, inputs = grad_output.reshape(-1, grad_output.shape[-1]), x.reshape(-1, x.shape[-1])
                # The few rows of a factor stand on the left: BLAS libraries are several times slower with them as
                # columns on the right.
                if ctx.masked and (ctx.operator == "exact_bf16" or x.dtype == torch.bfloat16):
                    grad_weight = (rows.bfloat16().T @ inputs.bfloat16()).mul_(mask)
                    grad_a = (b.T.bfloat16() @ grad_weight).to(a.dtype)
                    grad_b = (a.bfloat16() @ grad_weight.T).to(a.dtype).T
                elif ctx.masked:
                    grad_weight = (rows.T @ inputs).to(a.dtype).mul_(mask)
                    grad_a, grad_b = b.T @ grad_weight, (a @ grad_weight.T).T
                else:
                    grad_a = ((b.T.to(x.dtype) @ rows.T) @ inputs).to(a.dtype)
                    grad_b = ((a.to(x.dtype) @ inputs.T) @ rows).to(a.dtype).T
                grad_a, grad_b = grad_a.mul_(ctx.scaling), grad_b.mul_(ctx.scaling)
        return grad_x, grad_a, grad_b, None, None, None, None, None, None


class _MaskedProduct(torch.autograd.Function):
    """x·(W⊙M)ᵀ + b for a frozen W, which is masked again in `backward` rather than kept masked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, mask)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, (whole(weight) * whole(mask)).to(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, None]:
        weight, mask = ctx.saved_tensors
        with torch.autocast(grad_output.device.type, enabled=False):
            return grad_output @ (whole(weight) * whole(mask)).to(grad_output.dtype), None, None, None


class MaskedLoRALinear(nn.Module):
    """A linear layer whose weight is frozen and pruned, with a low-rank update under the same mask.

    Args:
        linear: the dense layer; its weight and bias are taken over. Training changes neither; pruning with
            compensation or reconstruction may replace the weight by `set_weight`.
        max_rank: rows of A and columns of B that are allocated.
        rank: how many of them are active at first.
        scaling: s, the same whatever the rank.
        generator: of A's start, Kaiming-uniform over the inputs; B starts at zero, so the update does too.
        operator: how the gradients of A and B are taken, see `_MaskedLoRAFunction`.
        dropout: probability, in [0, 1), that the adapter does not see an input feature of a token, in training mode
            alone. The two parts of the weight then meet different inputs and need a matrix product each.
    A new layer is in evaluation mode, and parked (see `park`) if the weight of `linear` is on the meta device.
    Raises: ConfigError if `rank` exceeds `max_rank`.
    """

    weight: nn.Parameter
    mask: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        *,
        max_rank: int,
        rank: int,
        scaling: float,
        generator: torch.Generator,
        operator: Operator = "exact",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.scaling, self.operator, self.dropout = scaling, operator, dropout
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        bound = 1.0 / math.sqrt(self.in_features)
        start = torch.empty(max_rank, self.in_features, dtype=dtype).uniform_(-bound, bound, generator=generator)
        outlined = self.weight.is_meta
        device = torch.device("cpu") if outlined else self.weight.device
        self.lora_A = nn.Parameter(start.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, max_rank, dtype=dtype, device=device))
        self.register_buffer("mask", torch.ones(self.weight.shape, dtype=torch.uint8, device=device), persistent=False)
        self.rank = 0
        self.set_rank(rank)
        self._folded: Tensor | None = None
        self._dense: Tensor | None = None
        self._weight_changed = False
        self._parked_mask: NDArray[np.uint8] | None = None
        self._shares: Shares | None = None
        self._computes_dense = False
        self._prunes = False
        if outlined:
            self.park()
        self.eval()

    @property
    def weight_changed(self) -> bool:
        """Whether the frozen weight is another than the dense checkpoint's."""
        return self._weight_changed

    @property
    def parked(self) -> bool:
        """Whether the weight is away, as a whole at least; without `shares` of it the layer cannot compute then."""
        return self._parked_mask is not None

    @property
    def shares(self) -> Shares:
        """What this process has of a layer that was shared out."""
        assert self._shares is not None
        return self._shares

    def share(self, shares: Shares) -> None:
        """Park, but keep `shares`, with which the layer computes where all processes do so at once."""
        if not self.parked:
            self.park()
        self._shares = shares

    def park(self) -> None:
        """Let go of the frozen weight, changed or not, and of the mask but for its bits."""
        self._parked_mask = self.packed_mask()
        self.register_parameter("weight", None)
        self.register_buffer("mask", None, persistent=False)
        self._dense = None

    def unpark(self, dense: Tensor, changed: Tensor | None = None) -> None:
        """Take back the weight of the dense checkpoint and, if there is one, that in its place; both (out, in)."""
        kept = self.kept
        self.weight = nn.Parameter(dense if changed is None else changed, requires_grad=False)
        self.register_buffer("mask", kept.to(dense.device, torch.uint8), persistent=False)
        self._dense = None if changed is None else dense
        self._weight_changed = changed is not None
        self._parked_mask = None

    @property
    def dense_weight(self) -> Tensor:
        """(out, in), the dense checkpoint's weight, kept beside a changed one: a teacher needs it."""
        if self.parked:
            shares = self.shares
            return whole(shares.weight if shares.dense is None else shares.dense)
        return self.weight.detach() if self._dense is None else self._dense.to(self.weight.device)

    @property
    def max_rank(self) -> int:
        """Rank that is allocated."""
        return self.lora_A.shape[0]

    @property
    def size(self) -> int:
        """Positions of the weight."""
        return self.out_features * self.in_features

    @property
    def kept(self) -> Tensor:
        """(out, in) bool, True = keep."""
        if self._parked_mask is None:
            return self.mask.bool()
        bits = np.unpackbits(self._parked_mask, count=self.size, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_)).reshape(self.out_features, self.in_features)

    def packed_mask(self) -> NDArray[np.uint8]:
        """The mask in rows, eight positions to a byte, the first in the lowest bit."""
        if self._parked_mask is not None:
            return self._parked_mask
        return np.packbits(self.mask.cpu().numpy().reshape(-1), bitorder="little")

    def active(self) -> tuple[Tensor, Tensor]:
        """The active slices: A (rank, in) and B (out, rank)."""
        return self.lora_A[: self.rank], self.lora_B[:, : self.rank]

    def set_rank(self, rank: int) -> None:
        """Use the first `rank` components. Growing into untouched ones changes no output, since their B is zero.

        Raises: ConfigError outside 1 to `max_rank`.
        """
        if not 1 <= rank <= self.max_rank:
            raise ConfigError(f"rank {rank} of an adapter must lie between 1 and max_rank {self.max_rank}", rank=rank)
        self.rank = rank

    def set_mask(self, kept: Tensor) -> None:
        """Prune where `kept`, (out, in) bool, is False. Raises: MaskError for another shape."""
        shape = (self.out_features, self.in_features)
        if tuple(kept.shape) != shape:
            raise MaskError(
                f"a mask of shape {tuple(kept.shape)} does not fit a weight of shape {shape}; "
                "use the masks of this model"
            )
        self._prunes = not bool(kept.all())
        if self.parked:
            self._parked_mask = np.packbits(kept.cpu().numpy().reshape(-1), bitorder="little")
            if self._shares is not None:
                mask = self._shares.mask
                overwrite_rows(mask, kept.to(mask.device, mask.dtype))
        else:
            self.mask.copy_(kept)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Replace the frozen W by `weight`, (out, in), rounded to W's dtype. Raises: MaskError for another shape."""
        self._check_shape(weight)
        if self._dense is None:
            self._dense = self.weight.detach()
        self._weight_changed = True
        self.weight.data = weight.detach().to(self.weight, copy=True)

    @torch.no_grad()
    def set_effective_weight(self, effective: Tensor) -> None:
        """Choose W so that (W + s·BA)⊙M is `effective`, (out, in), where kept; W is 0 where pruned.

        Up to the rounding of W's dtype. Raises: MaskError for another shape.
        """
        self._check_shape(effective)
        a, b = self.active()
        delta = torch.mm(b, a).mul_(self.scaling)
        self.set_weight((effective.to(delta) - delta).mul_(self.mask))

    def _check_shape(self, weight: Tensor) -> None:
        if weight.shape != self.weight.shape:
            raise MaskError(
                f"a weight of shape {tuple(weight.shape)} cannot replace one of shape {tuple(self.weight.shape)}; "
                "use the weights of this model"
            )

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The effective weight (W + s·BA)⊙M, (out, in) in the adapters' dtype."""
        weight, mask = self._frozen()
        return effective_weight(whole(weight), whole(mask), *self.active(), self.scaling)

    def _frozen(self) -> tuple[Tensor, Tensor]:
        """Weight and mask, whole or shared out."""
        if self.parked:
            return self.shares.weight, self.shares.mask
        return self.weight, self.mask

    @contextlib.contextmanager
    def folded(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Within the block, compute with a weight that is merged once: for passes without gradients."""
        with self.computing_with(self.merged().to(dtype or self.lora_A.dtype)):
            yield

    @contextlib.contextmanager
    def computing_with(self, weight: Tensor) -> Iterator[None]:
        """Within the block, compute with `weight`, (out, in), and no adapter; gradients reach it."""
        self._folded = weight
        try:
            yield
        finally:
            self._folded = None

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out), in the dtype of `x`, or in autocast's where that is on."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self._folded is not None:
            return functional.linear(x, self._folded.to(x.dtype), bias)
        if self._computes_dense:
            return functional.linear(x, self.dense_weight.to(x.dtype), bias)
        a, b = self.active()
        weight, mask = self._frozen()
        if self.training and self.dropout > 0.0:
            base: Tensor = _MaskedProduct.apply(x, weight, mask, bias)  # type: ignore[no-untyped-call]
            seen, nothing = functional.dropout(x, self.dropout), a.new_zeros(())
            return base + self._product(seen, a, b, nothing, mask, None)
        return self._product(x, a, b, weight, mask, bias)

    def _product(self, x: Tensor, a: Tensor, b: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
        arguments = (x, a, b, weight, mask, bias, self.scaling, self.operator, self._prunes)
        output: Tensor = _MaskedLoRAFunction.apply(*arguments)  # type: ignore[no-untyped-call]
        return output

    @contextlib.contextmanager
    def dense(self) -> Iterator[None]:
        """Within the block, compute as the dense model does: no mask, no adapter."""
        self._computes_dense = True
        try:
            yield
        finally:
            self._computes_dense = False

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}/{self.max_rank}, s={self.scaling:g}"


@contextlib.contextmanager
def all_folded(layers: Mapping[str, MaskedLoRALinear], dtype: torch.dtype | None = None) -> Iterator[None]:
    """Within the block, `layers` compute with their effective weights, merged once; see `MaskedLoRALinear.folded`."""
    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(layer.folded(dtype))
        yield


@contextlib.contextmanager
def all_dense(layers: Mapping[str, MaskedLoRALinear], dtype: torch.dtype) -> Iterator[None]:
    """Within the block, `layers` compute as in the dense checkpoint, with weights converted once."""
    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(layer.computing_with(layer.dense_weight.to(dtype)))
        yield
