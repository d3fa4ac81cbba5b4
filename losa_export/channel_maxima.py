"""How large each channel between a norm and its linears gets on some text, by PyTorch.

``python -m losa_export.channel_maxima MODEL TOKENS.npy OUT`` computes it in a process of its own, so that the
exporter's memory holds no model.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from losa_export.apart import exit_code_of, run_apart
from losa_export.architecture import DecoderSpec
from losa_export.checkpoint import CONFIG_FILE, open_checkpoint
from losa_export.errors import CheckpointError
from losa_export.smoothing import ChannelMaxima, norm_readers


def channel_maxima(model_dir: Path, tokens: NDArray[np.int64]) -> dict[str, ChannelMaxima]:
    """Run a checkpoint over some tokens; one block's weights are in memory at a time.

    Args:
        model_dir: a checkpoint folder of a family that our builder knows.
        tokens: (n, S) token ids.
    Returns: for each norm before linears, by its module's name.
    Raises: CheckpointError if the folder cannot be opened, or activations are not finite.
    """
    import torch

    from losa_export.streamed import load_streamed

    spec = DecoderSpec.from_config(open_checkpoint(model_dir).config, model_dir / CONFIG_FILE)
    model: Any = load_streamed(model_dir)
    activations: dict[str, NDArray[np.float32]] = {}
    weights: dict[str, NDArray[np.float32]] = {}

    def watch_norm(name: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            activations[name] = output.abs().flatten(0, -2).amax(0).numpy()

        return hook

    def watch_linear(norm: str) -> Callable[..., None]:
        def hook(module: Any, _inputs: Any) -> None:
            found = module.weight.abs().amax(0).numpy()
            weights[norm] = np.maximum(weights[norm], found) if norm in weights else found

        return hook

    for block in range(spec.num_layers):
        for norm, linears in norm_readers(spec, block).items():
            model.get_submodule(norm).register_forward_hook(watch_norm(norm))
            for linear in linears:
                model.get_submodule(linear).register_forward_pre_hook(watch_linear(norm))
    with torch.inference_mode():
        model.base_model(input_ids=torch.from_numpy(tokens), use_cache=False)
    for norm, found in activations.items():
        if not np.isfinite(found).all():
            raise CheckpointError(
                f"'{norm}' of '{model_dir}' gives activations that are not finite; mend the checkpoint, or export with "
                "--smoothing 0",
                norm=norm,
            )
    return {norm: ChannelMaxima(activations[norm], weights[norm]) for norm in activations}


def channel_maxima_apart(model_dir: Path, tokens: NDArray[np.int64]) -> dict[str, ChannelMaxima]:
    """The same in a child process. Raises: RuntimeFailureError that quotes the child's message."""
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory(prefix="losa-maxima-") as scratch:
        given, out = Path(scratch) / "tokens.npy", Path(scratch) / "maxima.safetensors"
        np.save(given, tokens)
        run_apart("losa_export.channel_maxima", [model_dir, given, out], what=f"the activations of '{model_dir}'")
        tensors = load_file(out)
    norms = {name.rpartition("/")[0] for name in tensors}
    return {norm: ChannelMaxima(tensors[f"{norm}/activations"], tensors[f"{norm}/weights"]) for norm in norms}


def _save(path: Path, maxima: Mapping[str, ChannelMaxima]) -> None:
    from safetensors.numpy import save_file

    tensors = {f"{norm}/activations": found.activations for norm, found in maxima.items()}
    save_file(tensors | {f"{norm}/weights": found.weights for norm, found in maxima.items()}, path)


def _main(arguments: Sequence[str]) -> int:
    if len(arguments) != 3:
        sys.stderr.write("usage: python -m losa_export.channel_maxima MODEL TOKENS.npy OUT\n")
        return 2
    model, tokens, out = map(Path, arguments)
    return exit_code_of(lambda: _save(out, channel_maxima(model, np.load(tokens))))


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
