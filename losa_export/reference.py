"""What the model itself answers, in float32 by PyTorch, kept so that an export can be checked without PyTorch.

A reference holds three short prompts, the logits of all their positions, 32 greedy tokens after each, and the
logits of the first few of those steps. `merged/reference.safetensors` carries it to machines without torch;
``python -m losa_export.reference MODEL OUT`` computes it in a process of its own, so that the exporter's memory
holds no model.

An export that rounds weights has a second reference: the same model with the weights that stand in the exported
file. Held against it, a runtime must be as exact as one without rounding; what the rounding itself does to the
answers is the difference between the two references.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from losa_export.apart import exit_code_of, run_apart
from losa_export.checkpoint import open_checkpoint
from losa_export.errors import CheckpointError, FormatError, MissingDependencyError, RuntimeFailureError
from losa_export.files import write_bytes_atomic
from losa_export.layout import LAYOUTS, TIED_HEAD
from losa_export.smoothing import differ_by_powers_of_two
from losa_export.text import load_tokenizer

REFERENCE_FILE = "reference.safetensors"
PROMPT_COUNT = 3
PROMPT_TOKENS = 16
GREEDY_TOKENS = 32
DECODE_STEPS = 4

_FORMAT = "losa-reference-1"

# Three registers that any English model has some opinion on; cut to PROMPT_TOKENS.
_SENTENCES = (
    "Once upon a time there was a little girl who lived in a small house near the forest with her",
    "The river is the longest in the country and flows from the mountains through several cities to the sea",
    "To make a good cup of tea, first boil the water, then pour it over the leaves and wait",
)
# A prompt in which the tokenizer knew fewer different words than this would hardly test attention.
_LEAST_DIFFERENT = 4


@dataclass(frozen=True)
class Reference:
    """Answers of one model.

    Attributes:
        prompts: three (S,) int64 arrays of token ids, of equal length S.
        logits: (3, S, V) float32, at every position of the prompts.
        greedy: (3, G) int64, the arg-max tokens after each prompt. Ending tokens do not end them.
        greedy_margin: (3, G) float32 ≥ 0, the logit of each greedy token less that of the runner-up: a step
            with a margin within rounding may honestly go the other way elsewhere.
        decode_logits: (3, D, V) float32; step d has been fed the prompt and greedy[:, : d + 1].
        model_id: SHA-256 of the weights, as `Checkpoint.weights_sha256`.
    """

    prompts: tuple[NDArray[np.int64], ...]
    logits: NDArray[np.float32]
    greedy: NDArray[np.int64]
    greedy_margin: NDArray[np.float32]
    decode_logits: NDArray[np.float32]
    model_id: str


def default_prompts(folder: Path, vocab_size: int) -> tuple[NDArray[np.int64], ...]:
    """Three prompts of equal length: fixed sentences through the folder's tokenizer, cut or repeated to fit.

    Where there is no tokenizer, or it hardly knows the words, the ids are drawn with a fixed seed.

    Args:
        folder: a checkpoint or export folder.
        vocab_size: ids stay below it.
    Returns: three (PROMPT_TOKENS,) int64 arrays.
    """
    drawn = np.random.default_rng(0).integers(0, vocab_size, (PROMPT_COUNT, PROMPT_TOKENS))
    try:
        tokenizer = load_tokenizer(folder)
    except CheckpointError:
        return tuple(drawn)
    prompts = []
    for sentence, fallback in zip(_SENTENCES, drawn, strict=True):
        ids = np.array(tokenizer.encode(sentence, add_special_tokens=False).ids, dtype=np.int64)
        usable = ids.size > 0 and ids.max() < vocab_size and np.unique(ids).size >= _LEAST_DIFFERENT
        prompts.append(np.resize(ids, PROMPT_TOKENS) if usable else fallback)
    return tuple(prompts)


def compute_reference(
    model_dir: Path,
    *,
    prompts: Sequence[NDArray[np.int64]] | None = None,
    greedy_tokens: int = GREEDY_TOKENS,
    exported: Path | None = None,
) -> Reference:
    """Run a checkpoint by plain transformers, float32, eager attention.

    One decoder block's weights are in memory at a time, unless those of an exported folder take their place.

    Args:
        model_dir: a checkpoint folder.
        prompts: arrays (S,) of equal length; None takes `default_prompts`.
        greedy_tokens: G ≥ 1, how many tokens to continue each prompt by.
        exported: a folder exported from this checkpoint, whose rounded weights take the place of the checkpoint's.
    Raises:
        MissingDependencyError: torch or transformers is not installed.
        FormatError: the exported folder is damaged, or of another model.
        CheckpointError: the folder cannot be opened, the prompts are not of equal length, or the model has
            fewer positions than prompt and continuation need.
    """
    checkpoint = open_checkpoint(model_dir)
    vocab_size = int(checkpoint.config.get("vocab_size", 0))
    chosen = tuple(prompts) if prompts is not None else default_prompts(model_dir, vocab_size)
    if len({prompt.shape for prompt in chosen}) != 1 or chosen[0].ndim != 1:
        raise CheckpointError(
            f"reference prompts must be of one length, not {[prompt.shape for prompt in chosen]}; cut them"
        )
    needed = chosen[0].size + greedy_tokens
    positions = int(checkpoint.config.get("max_position_embeddings", needed))
    if positions < needed:
        raise CheckpointError(
            f"the model in '{model_dir}' has {positions} positions, but a reference of {chosen[0].size} prompt "
            f"and {greedy_tokens} greedy tokens needs {needed}; raise max_position_embeddings in its config.json",
            positions=positions,
            needed=needed,
        )
    _require_torch()
    import torch

    from losa_export.streamed import load_streamed

    if exported is None:
        model: Any = load_streamed(model_dir)
    else:
        model = load_model(model_dir)
        _take_weights(model, exported)

    with torch.inference_mode():
        answer = model(input_ids=torch.from_numpy(np.stack(chosen)), use_cache=True)
        logits = answer.logits.float().numpy()
        steps, margins, decoded, last = [], [], [], logits[:, -1]
        for step in range(greedy_tokens):
            token, margin = _top(last)
            steps.append(token)
            margins.append(margin)
            if step + 1 < greedy_tokens or step < DECODE_STEPS:
                answer = model(
                    input_ids=torch.from_numpy(token[:, None]), past_key_values=answer.past_key_values, use_cache=True
                )
                last = answer.logits[:, -1].float().numpy()
                if step < DECODE_STEPS:
                    decoded.append(last)
    return Reference(
        prompts=tuple(np.asarray(prompt, dtype=np.int64) for prompt in chosen),
        logits=np.ascontiguousarray(logits),
        greedy=np.stack(steps, axis=1),
        greedy_margin=np.stack(margins, axis=1),
        decode_logits=np.stack(decoded, axis=1),
        model_id=checkpoint.weights_sha256(),
    )


def load_model(folder: Path, dtype: str = "float32", attention: str = "eager") -> Any:
    """Load a checkpoint by plain transformers, on the CPU, ready for inference.

    Args:
        folder: a checkpoint folder; nothing is fetched.
        dtype: of weights and activations, as torch names it.
        attention: implementation, as transformers names it.
    Raises: MissingDependencyError without torch or transformers.
    """
    _require_torch()
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=attention, local_files_only=True
    )
    return model.eval()


def _require_torch() -> None:
    """Raises: MissingDependencyError naming the first package that running a model lacks."""
    for package in ("torch", "transformers", "accelerate"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingDependencyError.for_extra(error.name or package, "train", "running the model") from error


def _take_weights(model: Any, exported: Path) -> None:
    """Replace each weight that an exported folder stores in an operator of ours by what is stored there, and each norm
    before such weights by its own, which smoothing may have scaled.
    """
    import torch

    from losa_export.graph.external import check_external_data
    from losa_export.graph.stored import read_weights

    folder = check_external_data(exported)
    with torch.no_grad():
        for name, weight in read_weights(folder):
            parameter = _own_parameter(model, name)
            if tuple(parameter.shape) != weight.shape:
                raise FormatError(
                    f"'{exported}' stores '{name}' as {weight.shape}, the checkpoint's is {tuple(parameter.shape)}; "
                    "the folder was made from another checkpoint: export again",
                    tensor=name,
                )
            parameter.copy_(torch.from_numpy(weight))
        for name in _norms_of_blocks(model):
            if name in folder.tensors:
                parameter = model.get_parameter(name)
                scaled = folder.read(name).astype(np.float32)
                if not differ_by_powers_of_two(parameter.numpy(), scaled):
                    raise FormatError(
                        f"'{exported}' stores '{name}' otherwise than smoothing would have left the checkpoint's: "
                        "export again",
                        tensor=name,
                    )
                parameter.copy_(torch.from_numpy(scaled))


def _norms_of_blocks(model: Any) -> list[str]:
    """Names of their weights and biases; none in a family that is not known here, and never smoothed."""
    layout = LAYOUTS.get(type(model).__name__)
    if layout is None:
        return []
    norms = tuple(f".{norm}" for norm in layout.norms)
    names = [name for name, _ in model.named_parameters() if name.startswith(f"{layout.blocks}.")]
    return [name for name in names if name.rpartition(".")[0].endswith(norms)]


def _own_parameter(model: Any, name: str) -> Any:
    """A parameter by its name in a file. A tied head that is stored apart is untied first."""
    from torch import nn

    if name != TIED_HEAD:
        return model.get_parameter(name)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    return head.weight


def _top(logits: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Arg-max of each row (B, V), the first one at a tie, and its lead over the next: (B,) int64, (B,) float32."""
    token = logits.argmax(axis=-1).astype(np.int64)
    two = np.partition(logits, -2, axis=-1)[:, -2:]
    return token, (two[:, 1] - two[:, 0]).astype(np.float32)


def save_reference(path: Path, reference: Reference) -> None:
    """Write a reference as one safetensors file, under a temporary name first. Raises: OutputError."""
    from safetensors.numpy import save

    tensors = {
        "prompts": np.stack(reference.prompts),
        "logits": reference.logits,
        "greedy": reference.greedy,
        "greedy_margin": reference.greedy_margin,
        "decode_logits": reference.decode_logits,
    }
    # safetensors writes the buffer as it lies, whatever the strides
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    write_bytes_atomic(path, save(tensors, metadata={"format": _FORMAT, "model_id": reference.model_id}))


def load_reference(path: Path) -> Reference | None:
    """Read a reference, or None where the file does not exist.

    Raises: CheckpointError when it is damaged, of another format, or its tensors contradict each other.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise _unusable(path, f"is truncated or damaged ({error})") from error
    if metadata.get("format") != _FORMAT or "model_id" not in metadata:
        raise _unusable(path, f"has format {metadata.get('format')!r} where {_FORMAT!r} is expected")
    _check_tensors(path, tensors)
    return Reference(
        prompts=tuple(tensors["prompts"]),
        logits=tensors["logits"],
        greedy=tensors["greedy"],
        greedy_margin=tensors["greedy_margin"],
        decode_logits=tensors["decode_logits"],
        model_id=metadata["model_id"],
    )


def _check_tensors(path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    forms = {
        "prompts": (np.int64, "PS"),
        "logits": (np.float32, "PSV"),
        "greedy": (np.int64, "PG"),
        "greedy_margin": (np.float32, "PG"),
        "decode_logits": (np.float32, "PDV"),
    }
    sizes: dict[str, int] = {}
    for name, (dtype, axes) in forms.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise _unusable(path, f"lacks '{name}'")
        agrees = tensor.dtype == dtype and tensor.ndim == len(axes) and tensor.size > 0
        if not agrees or any(
            sizes.setdefault(axis, size) != size for axis, size in zip(axes, tensor.shape, strict=True)
        ):
            raise _unusable(
                path, f"holds '{name}' of dtype {tensor.dtype}, shape {tensor.shape}, which fits nothing else"
            )
        if dtype == np.float32 and not np.isfinite(tensor).all():
            raise _unusable(path, f"holds a value in '{name}' that is not finite")
    for name in ("prompts", "greedy"):
        if tensors[name].min() < 0 or tensors[name].max() >= sizes["V"]:
            raise _unusable(path, f"holds a token in '{name}' outside the vocabulary of {sizes['V']}")


def _unusable(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"the reference '{path}' {what}; make it again with 'losa merge'", path=path)


def compute_reference_apart(
    model_dir: Path, path: Path, *, exported: Path | None = None, timeout_s: float = 1800.0
) -> Reference:
    """Compute a reference in a child process and save it, so that this process's memory stays small.

    Args:
        model_dir: a checkpoint folder.
        path: the file to write.
        exported: see `compute_reference`.
        timeout_s: seconds until the child is stopped.
    Raises:
        RuntimeFailureError: the child failed; its own message is quoted.
    """
    given = [model_dir, path, *([] if exported is None else [exported])]
    run_apart("losa_export.reference", given, what=f"the reference of '{model_dir}'", timeout_s=timeout_s)
    reference = load_reference(path)
    if reference is None:
        raise RuntimeFailureError(f"the reference of '{model_dir}' was computed, but not written", model_dir=model_dir)
    return reference


def _main(arguments: Sequence[str]) -> int:
    if len(arguments) not in (2, 3):
        sys.stderr.write("usage: python -m losa_export.reference MODEL OUT [EXPORTED]\n")
        return 2
    model, out, *exported = map(Path, arguments)
    return exit_code_of(
        lambda: save_reference(out, compute_reference(model, exported=exported[0] if exported else None))
    )


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
