"""Everything that can be found wrong before the model is loaded, and the identity of what a run starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from losa_export.architecture import DecoderSpec, check_tensors, prunable_names
from losa_export.chat import load_chat_template
from losa_export.checkpoint import CONFIG_FILE, open_checkpoint
from losa_export.errors import ConfigError
from losa_export.files import sha256_of
from losa_export.text import check_token_ids, load_tokenizer, read_documents, token_examples, token_windows
from losa_export.text_rows import Message
from losa_export.training.config import FREE_ON_RESUME, TrainConfig, to_table
from losa_export.training.pattern import Pattern
from losa_export.training.spacing import space_some


@dataclass(frozen=True)
class TrainInputs:
    """Checked inputs of a run.

    Attributes:
        spec: the decoder.
        calibration: (calibration_windows, calibration_window) int64 token ids, none of them padding.
        tuning: int64 token ids: (n, window), or without packing n examples of their own lengths.
        weight_hashes: weight file name to SHA-256.
        tokenizer_hash: SHA-256 of tokenizer.json.
        fingerprint: all that must be the same when the run is resumed.
    """

    spec: DecoderSpec
    calibration: NDArray[np.int64]
    tuning: NDArray[np.int64] | list[NDArray[np.int64]]
    weight_hashes: dict[str, str]
    tokenizer_hash: str
    fingerprint: dict[str, Any]


def check_inputs(config: TrainConfig) -> TrainInputs:
    """Open the checkpoint's headers and the texts.

    Raises:
        InputError, CheckpointError, UnsupportedArchitectureError: the model folder.
        TextError: a text that is missing or fills no window.
        ConfigError: a window longer than the model's context.
    """
    checkpoint = open_checkpoint(config.model)
    spec = DecoderSpec.from_config(checkpoint.config, config.model / CONFIG_FILE)
    check_tensors(checkpoint, spec)
    if config.pattern is not None:
        pattern = Pattern.parse(config.pattern)
        for name in prunable_names(spec):
            pattern.check_columns(name, checkpoint.shape(name)[1])
    if config.block_sparsities and len(config.block_sparsities) != spec.num_layers:
        raise ConfigError(
            f"block_sparsities has {len(config.block_sparsities)} values, but the model has {spec.num_layers} blocks; "
            "give one for each",
            field="block_sparsities",
        )
    for field in ("window", "calibration_window"):
        value = getattr(config, field)
        if value is not None and value > spec.max_positions:
            raise ConfigError(
                f"{field} is {value}, but the model reads at most {spec.max_positions} tokens; shorten it", field=field
            )
    tokenizer = load_tokenizer(config.model)
    bos = _bos(config, spec) if config.add_bos else None
    eos = spec.eos_token_ids[0] if config.add_eos and spec.eos_token_ids else None
    render_chat = _chat_renderer(config)
    tuning_documents = _read(config, config.tuning_text, render_chat)
    calibration_documents = (
        _read(config, config.calibration_text, render_chat) if config.calibration_text else tuning_documents
    )
    calibration = token_windows(
        calibration_documents,
        tokenizer,
        config.calibration_window or config.window,
        config.calibration_windows,
        config.seed,
        separator=eos,
        bos=bos,
    )
    tuning: NDArray[np.int64] | list[NDArray[np.int64]]
    if config.packing:
        tuning = token_windows(tuning_documents, tokenizer, config.window, None, None, separator=eos, bos=bos)
    else:
        tuning = token_examples(tuning_documents, tokenizer, config.window, bos=bos, eos=eos)
    for windows, files in ((calibration, config.calibration_files), (tuning, config.tuning_text)):
        check_token_ids(np.concatenate(windows), spec.vocab_size, config.model, files[0])
    weight_hashes = {path.name: sha256_of(path) for path in checkpoint.weight_files()}
    tokenizer_hash = sha256_of(config.model / "tokenizer.json")
    settings = {name: value for name, value in to_table(config).items() if name not in FREE_ON_RESUME}
    contents = {
        "model weights": weight_hashes,
        "model config": sha256_of(config.model / CONFIG_FILE),
        "tokenizer": tokenizer_hash,
        "tuning text": [sha256_of(path) for path in config.tuning_text],
        "calibration text": [sha256_of(path) for path in config.calibration_files],
    }
    return TrainInputs(spec, calibration, tuning, weight_hashes, tokenizer_hash, {**settings, **contents})


def _read(
    config: TrainConfig, files: Sequence[Path], render_chat: Callable[[Sequence[Message]], str] | None
) -> list[str]:
    """The documents of some text files, as they are tuned on."""
    return space_some(read_documents(files, render_chat), config.spaced_fraction, config.seed)


def _bos(config: TrainConfig, spec: DecoderSpec) -> int:
    if spec.bos_token_id is None:
        raise ConfigError(
            f"add_bos is on, but '{config.model / CONFIG_FILE}' names no bos_token_id; turn it off", field="add_bos"
        )
    return spec.bos_token_id


def _chat_renderer(config: TrainConfig) -> Callable[[Sequence[Message]], str] | None:
    """The model's own way to write a conversation, if it brings one."""
    template = load_chat_template(config.model)
    if template is None:
        return None
    return lambda messages: template.render(messages, add_generation_prompt=False)


def one_shot_config(config: TrainConfig) -> TrainConfig:
    """The configuration that prunes once to the final sparsity, and tunes nothing."""
    return dataclasses.replace(
        config,
        rounds=1,
        steps=0,
        time_budget_seconds=None,
        reconstruct_epochs=0,
        reconstruct_least_squares=False,
    )
