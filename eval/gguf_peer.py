"""A dense model as a GGUF file for llama.cpp: what a user would run instead of a sparse model.

``python -m losa_export.eval.gguf_peer dense/ -o q4/ --values Q4_0`` writes model.gguf, rounded by llama.cpp itself, and
beside it a checkpoint of the very weights that stand there, widened to float32: what `losa bench` holds llama.cpp's
answers against. Then ``losa bench onnx/ --against dense-onnx/ --runtime ort,llamacpp:q4/ --answers own`` compares.

The file has no tokenizer: benchmarks speak in token ids.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from losa_export.architecture import DecoderSpec, check_tensors, tensor_shapes
from losa_export.checkpoint import Checkpoint, CheckpointWriter, copy_companions, open_checkpoint
from losa_export.errors import (
    ConfigError,
    LosaError,
    MissingDependencyError,
    RuntimeFailureError,
    UnsupportedArchitectureError,
)
from losa_export.files import check_output, output_folder, write_text_atomic
from losa_export.gguf_import import gguf_name, hugging_face_name, permute_rotary, unpermute_rotary
from losa_export.onnx_file import MANIFEST_FILE
from losa_export.progress import Progress
from losa_export.runtimes.isolated import isolated_engine
from losa_export.runtimes.llamacpp import GGUF_FILE

Values = Literal["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K"]
VALUES: tuple[Values, ...] = get_args(Values)
_WIDE = "wide.gguf"
_EXACT = ("F32", "F16", "BF16")

# Runs in llama.cpp's environment: source, destination, llama.cpp's name of the type, 'pure' or ''.
_QUANTISE = """\
import sys
import llama_cpp.llama_cpp as library
source, destination, kind, pure = sys.argv[1:]
settings = library.llama_model_quantize_default_params()
settings.ftype = getattr(library, kind)
settings.pure = bool(pure)
library.llama_backend_init()
sys.exit(library.llama_model_quantize(source.encode(), destination.encode(), settings))
"""


def write_gguf_peer(
    model: Path, output: Path, *, values: Values = "Q4_0", pure: bool = False, overwrite: bool = False
) -> int:
    """Write `output`: model.gguf, a checkpoint of its weights in float32, and export.json.

    Args:
        model: dense checkpoint of the plain Llama family.
        output: folder to write.
        values: type of the weights, as llama.cpp calls it; its mixtures keep the head in a wider one.
        pure: the same type for all, the head included: smaller and faster, and less exact.
        overwrite: replace a non-empty output folder.
    Returns: bytes of model.gguf.
    Raises:
        ConfigError: unknown values.
        UnsupportedArchitectureError: another family, biases, or scaled rotary embedding.
        EngineUnavailableError: llama.cpp's environment is not installed.
        MissingDependencyError: the package gguf is not.
        RuntimeFailureError: llama.cpp cannot round it, with its last words.
        CheckpointError, OutputError: the model cannot be read, or the output not written.
    """
    if values not in VALUES:
        raise ConfigError(f"values is {values!r}; choose one of {', '.join(VALUES)}", field="values")
    check_output(output, overwrite=overwrite, inputs=[model])
    checkpoint = open_checkpoint(model)
    spec = DecoderSpec.from_config(checkpoint.config, model)
    _check_family(spec, model)
    check_tensors(checkpoint, spec)
    engine = isolated_engine("llamacpp")
    interpreter = engine.interpreter
    with output_folder(output, overwrite=overwrite, inputs=[model]) as folder:
        wide, final = folder / _WIDE, folder / GGUF_FILE
        _write_wide(checkpoint, spec, wide)
        if values == "F32":
            wide.rename(final)
        else:
            kind = f"LLAMA_FTYPE_MOSTLY_{values}"
            command = [str(interpreter), "-I", "-c", _QUANTISE, str(wide), str(final), kind, "pure" if pure else ""]
            done = subprocess.run(
                command, env=engine.process_environment(), capture_output=True, text=True, errors="replace"
            )
            if done.returncode != 0:
                last = "\n".join(done.stderr.strip().splitlines()[-8:])
                raise RuntimeFailureError(
                    f"llama.cpp cannot round '{model}' to {values}:\n{last}", code=done.returncode
                )
            wide.unlink()
        _write_rounded(final, checkpoint.config, spec, folder)
        copy_companions(model, folder)
        record = {
            "format": "losa-gguf-peer-1",
            "values": f"GGUF {values}{', pure' if pure else ''}",
            "head": f"GGUF {values}" if pure or values in _EXACT else "as llama.cpp chooses",
            # Weights of few bits meet activations of 8. For others the cache alone rounds, to float16.
            "activations": "int16" if values in _EXACT else "int8",
        }
        write_text_atomic(folder / MANIFEST_FILE, json.dumps(record, indent=2) + "\n")
        return final.stat().st_size


def _check_family(spec: DecoderSpec, model: Path) -> None:
    plain = replace(spec, attention_bias=False, output_bias=False, mlp_bias=False, qk_norm=False, sliding_window=None)
    if spec.architecture != "LlamaForCausalLM" or spec != plain or spec.rope is None or spec.rope.kind != "default":
        raise UnsupportedArchitectureError(
            f"'{model}' is no plain Llama (no biases, no scaled rotary embedding); only these are written as GGUF",
            architecture=spec.architecture,
        )


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError.for_extra("gguf", "demo", "writing a GGUF file") from error
    return gguf


def _write_wide(checkpoint: Checkpoint, spec: DecoderSpec, path: Path) -> None:
    """All weights in float32, a tensor at a time."""
    assert spec.rope is not None
    writer = _gguf().GGUFWriter(path, "llama")
    writer.add_vocab_size(spec.vocab_size)
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope.theta)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_tokenizer_model("no_vocab")
    shapes = tensor_shapes(spec)
    for name, shape in shapes.items():
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for name in shapes:
            weight, heads = checkpoint.read(name), _rotary_heads(name, spec)
            writer.write_tensor_data(permute_rotary(weight, heads) if heads else weight)
    finally:
        writer.close()


def _rotary_heads(name: str, spec: DecoderSpec) -> int:
    """Heads of a projection whose rows llama.cpp has in another order; 0 for other tensors."""
    heads = {"self_attn.q_proj.weight": spec.num_heads, "self_attn.k_proj.weight": spec.num_kv_heads}
    return next((count for ending, count in heads.items() if name.endswith(ending)), 0)


def _write_rounded(path: Path, config: dict[str, Any], spec: DecoderSpec, folder: Path) -> None:
    """A checkpoint of the weights that stand in a GGUF file."""
    gguf = _gguf()
    reader = gguf.GGUFReader(path)
    with (
        Progress("reading back", len(reader.tensors), "tensors") as progress,
        CheckpointWriter(folder, dict(config) | {"dtype": "float32"}) as writer,
    ):
        for tensor in reader.tensors:
            name = hugging_face_name(tensor.name, path)
            weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            heads = _rotary_heads(name, spec)
            writer.add(name, unpermute_rotary(weight, heads) if heads else weight)
            progress.advance()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns: the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m losa_export.eval.gguf_peer", description="Write a dense Llama as a GGUF file for llama.cpp."
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="dense checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--values", choices=VALUES, default="Q4_0", help="type of the weights (default: %(default)s)")
    parser.add_argument("--pure", action="store_true", help="that type for the head and all else, too")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it is not empty")
    arguments = parser.parse_args(argv)
    try:
        size = write_gguf_peer(
            arguments.model,
            arguments.output,
            values=arguments.values,
            pure=arguments.pure,
            overwrite=arguments.overwrite,
        )
    except LosaError as error:
        sys.stderr.write(f"losa: error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"{arguments.output / GGUF_FILE}: {arguments.values}, {size:,} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
