"""Random checkpoints in the shapes of published models: latency and memory depend on shapes and zeros alone."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from losa_export.architecture import DecoderSpec, prunable_names, tensor_shapes
from losa_export.checkpoint import CONFIG_FILE
from losa_export.errors import ConfigError, OutputError
from losa_export.files import check_output, output_folder
from losa_export.progress import Progress

SynthDtype = Literal["fp32", "bf16"]
_WORDS = 300
_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama; `kv_heads` divides `heads`, which divides `hidden`."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    blocks: int
    vocabulary: int
    positions: int
    rope_theta: float = 10000.0
    tied: bool = False

    def config(self, blocks: int, dtype: SynthDtype) -> dict[str, object]:
        """Its config.json, with so many blocks."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_hidden_layers": blocks,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "float32" if dtype == "fp32" else "bfloat16",
        }


# Source: the models' own config.json.
SHAPES: Mapping[str, LlamaShape] = {
    "smollm2-135m": LlamaShape(576, 1536, 9, 3, 30, 49152, 8192, rope_theta=100000.0, tied=True),
    "tinyllama-1.1b": LlamaShape(2048, 5632, 32, 4, 22, 32000, 2048),
    "llama-2-7b": LlamaShape(4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-2-13b": LlamaShape(5120, 13824, 40, 40, 40, 32000, 4096),
}


@dataclass(frozen=True)
class SynthConfig:
    """What to write.

    Attributes:
        like: a name of `SHAPES`.
        output: checkpoint folder to make.
        blocks: decoder blocks; None is as many as the published model has.
        sparsity_fraction: zeros in each row of each linear of the blocks, rounded down to whole weights.
        dtype: of the file.
        seed: of all weights; no two tensors are alike.
        overwrite: replace a non-empty output folder.
        progress: show progress on standard error.
    Raises: ConfigError naming the field that is out of range.
    """

    like: str
    output: Path
    blocks: int | None = None
    sparsity_fraction: float = 0.0
    dtype: SynthDtype = "fp32"
    seed: int = 0
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.like not in SHAPES:
            raise ConfigError(f"like is '{self.like}'; choose one of {', '.join(SHAPES)}", field="like")
        if self.blocks is not None and self.blocks < 1:
            raise ConfigError(f"blocks is {self.blocks}; give at least 1", field="blocks")
        if not 0.0 <= self.sparsity_fraction < 1.0:
            raise ConfigError(
                f"sparsity_fraction is {self.sparsity_fraction}; it must lie in [0, 1)", field="sparsity_fraction"
            )
        if self.dtype not in get_args(SynthDtype):
            raise ConfigError(f"dtype is '{self.dtype}'; choose fp32 or bf16", field="dtype")


def synthesise(config: SynthConfig) -> int:
    """Write the checkpoint of `config`, one block in memory at a time.

    Returns: bytes of its weights.
    Raises: OutputError if the destination is not empty, or has not the space for it.
    """
    shape = SHAPES[config.like]
    return write_random_checkpoint(shape, config.blocks or shape.blocks, config)


def write_random_checkpoint(shape: LlamaShape, blocks: int, config: SynthConfig) -> int:
    """As `synthesise`, for any shape: `config.like` and `config.blocks` are not looked at."""
    settings = shape.config(blocks, config.dtype)
    spec = DecoderSpec.from_config(settings, config.output / CONFIG_FILE)
    shapes = tensor_shapes(spec)
    total = sum(math.prod(size) for size in shapes.values()) * _BYTES[config.dtype]
    check_output(config.output, overwrite=config.overwrite, inputs=[])
    _check_space(config.output, total)
    prunable = frozenset(prunable_names(spec))
    index: dict[str, str] = {}
    with (
        output_folder(config.output, overwrite=config.overwrite) as folder,
        Progress("writing", total / 1e6, "MB", enabled=config.progress) as progress,
    ):
        for file, names in _files(spec, shapes):
            tensors = {
                name: _tensor(config, list(shapes).index(name), shapes[name], sparse=name in prunable) for name in names
            }
            _save(tensors, folder / file)
            index |= dict.fromkeys(names, file)
            progress.advance(sum(tensor.nbytes for tensor in tensors.values()) / 1e6)
        table = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        _write_tokenizer(folder)
    return total


def _check_space(output: Path, needed: int) -> None:
    parent = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"'{output}' needs {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free; give fewer --blocks, "
            "--dtype bf16, or another disk with -o",
            path=output,
        )


def _files(spec: DecoderSpec, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, list[str]]]:
    """File names and their tensors: one file for each block, and one for the rest."""
    rest = list(shapes)
    for block in range(spec.num_layers):
        names = [name for name in rest if name.startswith(spec.layout.prefix(block))]
        rest = [name for name in rest if name not in names]
        yield f"model-block-{block:03d}.safetensors", names
    yield "model-rest.safetensors", rest


def _tensor(config: SynthConfig, number: int, size: tuple[int, ...], *, sparse: bool) -> NDArray[Any]:
    """Tensor `number` of the checkpoint: ones for a norm, else normal values, the smallest of each row zero."""
    kind = np.dtype(np.float32 if config.dtype == "fp32" else _bfloat16())
    if len(size) == 1:
        return np.ones(size, kind)
    generator = np.random.default_rng([config.seed, number])
    weight = generator.standard_normal(size, dtype=np.float32)
    zeros = math.floor(config.sparsity_fraction * size[1]) if sparse else 0
    if zeros:
        smallest = np.argpartition(np.abs(weight), zeros - 1, axis=1)[:, :zeros]
        np.put_along_axis(weight, smallest, np.float32(0.0), axis=1)
    # Rows of length 1 on average: outputs then have the scale of inputs, however many weights are left.
    weight *= np.float32(math.sqrt(size[0]) / np.linalg.norm(weight))
    return weight.astype(kind, copy=False)


def _bfloat16() -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16


def _save(tensors: Mapping[str, NDArray[Any]], path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(dict(tensors), path, metadata={"format": "pt"})


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer of a few made-up words, w0 to w299, since some commands want one."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(_WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def random_words(tokens: int, seed: int = 0) -> str:
    """So many words that the tokenizer of a random checkpoint knows."""
    words = np.random.default_rng(seed).integers(1, _WORDS, tokens)
    return " ".join(f"w{word}" for word in words) + "\n"
