"""What training minimises, without ever holding the logits of a whole batch.

The loss is the mean next-token cross-entropy; on demand λ₁ times KL(dense ‖ sparse) of the predictions and λ₂ times
the relative squared errors of the blocks' outputs are added. The dense model is the same one without masks and
adapters, so that a teacher costs a forward pass and the memory of its blocks' outputs, but no second set of weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from losa_export.layout import layout_of
from losa_export.training.adapter import MaskedLoRALinear

# Rows of logits alive at once: few enough for a processor's caches, enough for matrix products at full speed.
_CHUNK_ROWS = 128


class _FrozenHeadLoss(torch.autograd.Function):
    """Mean cross-entropy of softmax(h Wᵀ), and λ₁ times its mean divergence from the teacher's predictions.

    The gradient for h is made in the same pass; W and the teacher get none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        teacher: Tensor | None,
        kl_weight: float,
        count: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, exact = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        surprise = torch.zeros((), dtype=torch.float64, device=hidden.device)
        divergence = torch.zeros_like(surprise)
        divisor = count.to(exact)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        chunk = _Chunk(min(rows, _CHUNK_ROWS), head)
        for start in range(0, rows, _CHUNK_ROWS):
            part = slice(start, min(start + _CHUNK_ROWS, rows))
            wanted = targets[part].unsqueeze(1)
            log_chosen = chunk.log_probabilities(hidden[part], 0)
            surprise -= log_chosen.gather(1, wanted).sum(dtype=torch.float64)
            if teacher is not None:
                log_expected = chunk.log_probabilities(teacher[part], 1)
                expected = torch.exp(log_expected, out=chunk.spare(log_expected))
                divergence += log_expected.sub_(log_chosen).mul_(expected).sum(dim=1).sum(dtype=torch.float64)
            if grad is not None:
                probabilities = log_chosen.exp_()
                if teacher is not None:
                    probabilities.mul_(1.0 + kl_weight).sub_(expected, alpha=kl_weight)
                probabilities.scatter_add_(1, wanted, probabilities.new_full(wanted.shape, -1.0))
                grad[part] = (chunk.in_head_dtype(probabilities) @ head).div_(divisor)
        ctx.save_for_backward(grad)
        surprise, divergence = surprise / count, divergence / count
        parts = surprise.to(exact), divergence.to(exact)
        ctx.mark_non_differentiable(*parts)
        return (surprise + kl_weight * divergence).to(exact), *parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_output.to(grad.dtype), None, None, None, None, None


class _Chunk:
    """Room for some rows of logits that serves all chunks: fresh memory for each costs more time than the arithmetic.

    Args:
        rows: at most so many at once.
        head: (vocabulary, hidden) output embedding.
    """

    def __init__(self, rows: int, head: Tensor) -> None:
        exact = torch.promote_types(head.dtype, torch.float32)
        self._head = head
        self._product = torch.empty(rows, head.shape[0], dtype=head.dtype, device=head.device)
        self._exact = [torch.empty(rows, head.shape[0], dtype=exact, device=head.device) for _ in range(3)]

    def log_probabilities(self, hidden: Tensor, place: int) -> Tensor:
        """(rows, vocabulary) of softmax(h Wᵀ), float32 or better, from (rows, hidden), in room `place`, 0 or 1."""
        rows = hidden.shape[0]
        product = torch.mm(hidden, self._head.T, out=self._product[:rows])
        logits = self._exact[2][:rows].copy_(product)
        return torch.log_softmax(logits, dim=1, out=self._exact[place][:rows])

    def spare(self, like: Tensor) -> Tensor:
        """Room of the shape of `like`; the next `log_probabilities` take it."""
        return self._exact[2][: like.shape[0]]

    def in_head_dtype(self, values: Tensor) -> Tensor:
        """`values`, (rows, vocabulary), in the dtype of the output embedding."""
        return self._product[: values.shape[0]].copy_(values)


Value = TypeVar("Value")
Average = Callable[[Tensor], Tensor]


class Losses(NamedTuple, Generic[Value]):
    """A loss and its terms: total = cross_entropy + λ₁·kl + λ₂·squarehead. The total alone has a gradient.

    Attributes:
        total: what training minimises.
        cross_entropy: mean negative log-likelihood of a token.
        kl: KL(dense ‖ sparse) of a token's prediction; 0 where it is not asked for.
        squarehead: sum over blocks of `relative_error`; 0 where it is not asked for.
    """

    total: Value
    cross_entropy: Value
    kl: Value
    squarehead: Value


def _alone(values: Tensor) -> Tensor:
    return values


def next_token_loss(
    hidden: Tensor,
    head: Tensor,
    input_ids: Tensor,
    lengths: Tensor | None = None,
    teacher: Tensor | None = None,
    kl_weight: float = 0.0,
    average: Average = _alone,
) -> Losses[Tensor]:
    """Mean negative log-likelihood of every token but the first of each window, and λ₁·KL on demand.

    Args:
        hidden: (windows, tokens, hidden) final hidden states.
        head: (vocabulary, hidden) frozen output embedding.
        input_ids: (windows, tokens) int64.
        lengths: (windows,) int64 tokens of each window that are no padding; None where all are. Padding stands at
            the end and counts neither as a target nor in the mean.
        teacher: final hidden states of the dense model, shaped as `hidden`; None without distillation.
        kl_weight: λ₁ of Σ_v p_T(v)·(ln p_T(v) − ln p(v)), at temperature 1, averaged over the same tokens.
        average: takes a tensor's mean over the processes of a run. The mean of their losses is then the mean over the
            tokens of all of them, however those are shared out.
    Returns: scalars, float32 or better; sums are float64.
    """
    states, targets = hidden[:, :-1].reshape(-1, hidden.shape[-1]), input_ids[:, 1:].reshape(-1)
    wisdom = None if teacher is None else teacher[:, :-1].reshape(-1, hidden.shape[-1])
    if lengths is not None:
        counted = valid_tokens(lengths, input_ids.shape[1])[:, 1:].reshape(-1)
        states, targets = states[counted], targets[counted]
        wisdom = None if wisdom is None else wisdom[counted]
    count = average(torch.tensor(float(targets.numel()), dtype=torch.float64, device=hidden.device))
    total, surprise, divergence = _FrozenHeadLoss.apply(  # type: ignore[no-untyped-call]
        states, head, targets, wisdom, kl_weight, count
    )
    return Losses(total, surprise, divergence, torch.zeros_like(surprise))


def valid_tokens(lengths: Tensor, tokens: int) -> Tensor:
    """(windows, tokens) bool, True where a token is no padding, from (windows,) int64 lengths."""
    return torch.arange(tokens, device=lengths.device) < lengths.unsqueeze(1)


class _RelativeError(torch.autograd.Function):
    """‖h − h_T‖² / ‖h_T‖² over the valid tokens. Only references to h and h_T are kept; h_T gets no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, teacher: Tensor, valid: Tensor | None, energy: Tensor) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        difference = _difference(hidden, teacher, valid)
        ctx.save_for_backward(hidden, teacher, valid, energy)
        return (difference.square().sum(dtype=torch.float64) / energy).to(exact)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, teacher, valid, energy = ctx.saved_tensors
        scale = (2.0 * grad_output.double() / energy).to(torch.promote_types(hidden.dtype, torch.float32))
        return _difference(hidden, teacher, valid).mul_(scale).to(hidden.dtype), None, None, None


def _difference(hidden: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
    exact = torch.promote_types(hidden.dtype, torch.float32)
    difference = hidden.to(exact) - teacher.to(exact)
    return difference if valid is None else difference.mul_(valid.unsqueeze(-1))


def energy_of(teacher: Tensor, lengths: Tensor | None = None) -> Tensor:
    """‖h_T‖² over the valid tokens, float64 and above zero; arguments as in `relative_error`."""
    reference = teacher.to(torch.promote_types(teacher.dtype, torch.float32))
    if lengths is not None:
        reference = reference * valid_tokens(lengths, teacher.shape[1]).unsqueeze(-1)
    return reference.square().sum(dtype=torch.float64).clamp_min(torch.finfo(torch.float32).tiny)


def relative_error(
    hidden: Tensor, teacher: Tensor, lengths: Tensor | None = None, energy: Tensor | None = None
) -> Tensor:
    """One block's term of SquareHead: ‖h − h_T‖² / ‖h_T‖².

    Args:
        hidden: (windows, tokens, hidden) output of the block.
        teacher: the dense block's, likewise; without gradient.
        lengths: (windows,) int64 tokens that are no padding; None where all are.
        energy: divides the error in place of ‖h_T‖²: its mean over the processes that share a batch.
    Returns: scalar, float32 or better.
    Source: Kurtic et al. 2023, "Sparse Fine-tuning for Inference Acceleration of Large Language Models",
        arXiv:2310.06927.
    """
    valid = None if lengths is None else valid_tokens(lengths, hidden.shape[1])
    energy = energy_of(teacher, lengths) if energy is None else energy
    error: Tensor = _RelativeError.apply(hidden, teacher, valid, energy)  # type: ignore[no-untyped-call]
    return error


@dataclass(frozen=True)
class Objective:
    """What `CausalLoss` adds up, and how it saves memory.

    Attributes:
        kl_weight: λ₁ of the divergence from the dense model's predictions; 0 leaves it out.
        squarehead_weight: λ₂ of the sum over blocks of `relative_error`; 0 leaves it out.
        checkpointing: keep the inputs of the blocks alone, and run each again for its gradients.
    """

    kl_weight: float = 0.0
    squarehead_weight: float = 0.0
    checkpointing: bool = False

    @property
    def distils(self) -> bool:
        """Whether a teacher is asked."""
        return self.kl_weight > 0.0 or self.squarehead_weight > 0.0


class CausalLoss(nn.Module):
    """A causal language model that returns its loss: one module for accelerate to wrap.

    Args:
        model: the model, with its parts where `losa_export.layout` says.
        objective: what to add up; plain cross-entropy if not given.
        average: takes a tensor's mean over the processes of a run, which the caller takes of losses and gradients
            too: they are then those of the whole batch. One process alone if not given.
    """

    def __init__(self, model: nn.Module, objective: Objective | None = None, average: Average = _alone) -> None:
        super().__init__()
        self.causal_model = model
        self.objective = objective or Objective()
        self._average = average

    def forward(self, input_ids: Tensor, lengths: Tensor | None = None) -> Losses[Tensor]:
        """Losses of (windows, tokens) int64; `lengths`, (windows,) int64, tells padding at the end of windows."""
        objective, layout = self.objective, layout_of(self.causal_model)
        head = self.causal_model.get_parameter(layout.head)
        blocks = tuple(self.causal_model.get_submodule(layout.blocks).children())
        teacher = self._teach(input_ids, blocks) if objective.distils else _Teacher(None, ())
        energies: Sequence[Tensor] = ()
        if teacher.blocks:
            energies = self._average(torch.stack([energy_of(output, lengths) for output in teacher.blocks])).unbind()
        errors: list[Tensor] = []

        def compare(index: int, output: Tensor) -> None:
            errors.append(relative_error(output, teacher.blocks[index], lengths, energies[index]))

        with contextlib.ExitStack() as stack:
            if objective.checkpointing:
                stack.enter_context(_checkpointed(blocks))
            if objective.squarehead_weight > 0.0:
                stack.enter_context(_watched(blocks, compare))
            hidden = self._hidden(input_ids)
        # Padding stands behind all that is read, so causal attention needs no mask for it.
        losses = next_token_loss(
            hidden,
            head,
            input_ids,
            lengths,
            teacher.final if objective.kl_weight > 0.0 else None,
            objective.kl_weight,
            self._average,
        )
        if not errors:
            return losses
        error = torch.stack(errors).sum()
        total = losses.total + objective.squarehead_weight * error
        return losses._replace(total=total, squarehead=error.detach())

    def _hidden(self, input_ids: Tensor) -> Tensor:
        output = self.causal_model.get_submodule("model")(input_ids=input_ids, use_cache=False)
        return cast(Tensor, output.last_hidden_state)

    @torch.no_grad()
    def _teach(self, input_ids: Tensor, blocks: Sequence[nn.Module]) -> _Teacher:
        outputs: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            for module in self.causal_model.modules():
                if isinstance(module, MaskedLoRALinear):
                    stack.enter_context(module.dense())
            if self.objective.squarehead_weight > 0.0:
                stack.enter_context(_watched(blocks, lambda _, output: outputs.append(output)))
            final = self._hidden(input_ids)
        return _Teacher(final, tuple(outputs))


@dataclass(frozen=True)
class _Teacher:
    """What the dense model computed: final hidden states, and each block's output if somebody asks for it."""

    final: Tensor | None
    blocks: tuple[Tensor, ...]


@contextlib.contextmanager
def _watched(blocks: Sequence[nn.Module], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Within the block, `see` is told each block's number and output, in order."""

    def hook(index: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, __, output: see(index, output[0] if isinstance(output, tuple) else output)

    with contextlib.ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(hook(index)).remove)
        yield


@contextlib.contextmanager
def _checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block, blocks keep their input alone, and compute the rest again in the backward pass.

    `forward` is wrapped rather than the call of the module, so that hooks run once, and outside.
    """

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **keywords: checkpoint(forward, *arguments, use_reentrant=False, **keywords)

    with contextlib.ExitStack() as stack:
        for block in blocks:
            block.forward = wrap(block.forward)  # shadows the class's method for a while
            stack.callback(delattr, block, "forward")
        yield
