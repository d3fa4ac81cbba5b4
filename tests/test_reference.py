"""The stored answers of a model: computed, saved, loaded, refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from losa_export.checkpoint import open_checkpoint
from losa_export.errors import CheckpointError, FormatError, MissingDependencyError, RuntimeFailureError
from losa_export.reference import (
    PROMPT_TOKENS,
    Reference,
    _main,
    _top,
    compute_reference,
    compute_reference_apart,
    default_prompts,
    load_reference,
    save_reference,
)

METADATA = {"format": "losa-reference-1", "model_id": "m"}


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Reference:
    pytest.importorskip("transformers", reason="needs the 'train' extra")
    return compute_reference(tiny_checkpoint)


@pytest.fixture
def tensors(reference: Reference, tmp_path: Path) -> dict[str, np.ndarray]:
    save_reference(tmp_path / "whole.safetensors", reference)
    return load_file(tmp_path / "whole.safetensors")


def test_shapes_are_those_the_gate_reads(reference: Reference, tiny_checkpoint: Path) -> None:
    assert [prompt.shape for prompt in reference.prompts] == [(16,)] * 3
    assert reference.logits.shape == (3, 16, 128)
    assert reference.greedy.shape == reference.greedy_margin.shape == (3, 32)
    assert reference.decode_logits.shape == (3, 4, 128)
    assert reference.model_id == open_checkpoint(tiny_checkpoint).weights_sha256()


def test_cached_steps_agree_with_one_pass_over_the_whole_text(reference: Reference, tiny_checkpoint: Path) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    whole = np.concatenate([np.stack(reference.prompts), reference.greedy], axis=1)
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(whole)).logits.numpy()
    # float32 sums over 64 to 176 terms, in another order with the cache: about 1e-6 of the largest logit
    tolerance = 1e-5 * np.abs(logits).max()
    assert np.abs(logits[:, :16] - reference.logits).max() < tolerance
    assert np.abs(logits[:, 16:20] - reference.decode_logits).max() < tolerance
    two = np.sort(logits[:, 15:-1], axis=-1)[..., -2:]
    assert np.abs((two[..., 1] - two[..., 0]) - reference.greedy_margin).max() < 2 * tolerance
    clear = reference.greedy_margin > 2 * tolerance
    assert np.array_equal(logits[:, 15:-1].argmax(-1)[clear], reference.greedy[clear])


def test_the_margin_is_the_lead_over_the_runner_up_and_ties_go_to_the_first() -> None:
    token, margin = _top(np.array([[1.0, 4.0, 2.5], [3.0, 0.0, 3.0]], np.float32))
    assert token.tolist() == [1, 0]
    assert margin.tolist() == [1.5, 0.0]


def test_prompts_are_fixed_sentences_cut_to_one_length(tiny_checkpoint: Path) -> None:
    from losa_export.text import load_tokenizer

    prompts = default_prompts(tiny_checkpoint, 128)
    tokenizer = load_tokenizer(tiny_checkpoint)
    assert tokenizer.id_to_token(int(prompts[0][2])) == "a"
    assert all(prompt.shape == (PROMPT_TOKENS,) and prompt.dtype == np.int64 for prompt in prompts)
    assert not np.array_equal(prompts[0], prompts[1])


@pytest.mark.parametrize("vocab_size", [2, 50000])
def test_without_a_tokenizer_prompts_are_drawn_with_a_fixed_seed(tmp_path: Path, vocab_size: int) -> None:
    first, second = default_prompts(tmp_path, vocab_size), default_prompts(tmp_path, vocab_size)
    assert np.array_equal(first, second)
    assert np.max(first) < vocab_size


def test_a_tokenizer_larger_than_the_vocabulary_is_not_used(tiny_checkpoint: Path) -> None:
    assert np.max(default_prompts(tiny_checkpoint, 5)) < 5


def test_saved_answers_load_bit_for_bit(reference: Reference, tmp_path: Path) -> None:
    save_reference(tmp_path / "r.safetensors", reference)
    loaded = load_reference(tmp_path / "r.safetensors")
    assert loaded is not None
    assert loaded.model_id == reference.model_id
    assert np.array_equal(loaded.prompts, reference.prompts)
    for field in ("logits", "greedy", "greedy_margin", "decode_logits"):
        assert np.array_equal(getattr(loaded, field), getattr(reference, field)), field
        assert getattr(loaded, field).dtype == getattr(reference, field).dtype


def test_strided_logits_are_saved_in_order(reference: Reference, tmp_path: Path) -> None:
    strided = dataclasses.replace(reference, logits=np.asfortranarray(reference.logits))
    save_reference(tmp_path / "r.safetensors", strided)
    loaded = load_reference(tmp_path / "r.safetensors")
    assert loaded is not None
    assert np.array_equal(loaded.logits, reference.logits)


def test_no_file_is_no_reference(tmp_path: Path) -> None:
    assert load_reference(tmp_path / "r.safetensors") is None


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.safetensors").write_bytes(b"\x80\0\0\0")
    with pytest.raises(CheckpointError, match=r"r\.safetensors' is truncated or damaged .*again with 'losa merge'"):
        load_reference(tmp_path / "r.safetensors")


def test_another_format_is_named(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "r.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="has format 'pt' where 'losa-reference-1' is expected"):
        load_reference(tmp_path / "r.safetensors")


def test_a_lacking_tensor_is_named(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    del tensors["greedy"]
    save_file(tensors, tmp_path / "r.safetensors", metadata=METADATA)
    with pytest.raises(CheckpointError, match="lacks 'greedy'"):
        load_reference(tmp_path / "r.safetensors")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("logits", lambda tensor: tensor[:, :-1]),
        ("logits", lambda tensor: tensor.astype(np.float64)),
        ("decode_logits", lambda tensor: tensor[..., :-1]),
        ("greedy_margin", lambda tensor: tensor[:2]),
        ("prompts", lambda tensor: tensor[0]),
        ("greedy", lambda tensor: tensor[:, :0]),
    ],
)
def test_shapes_that_contradict_each_other_are_named(
    tensors: dict[str, np.ndarray], tmp_path: Path, name: str, change: object
) -> None:
    tensors[name] = np.ascontiguousarray(change(tensors[name]))  # type: ignore[operator]
    save_file(tensors, tmp_path / "r.safetensors", metadata=METADATA)
    with pytest.raises(CheckpointError, match=r"holds '\w+' of dtype \w+, shape \(.*\), which fits nothing else"):
        load_reference(tmp_path / "r.safetensors")


def test_a_token_outside_the_vocabulary_is_named(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    tensors["greedy"][0, 0] = 128
    save_file(tensors, tmp_path / "r.safetensors", metadata=METADATA)
    with pytest.raises(CheckpointError, match="holds a token in 'greedy' outside the vocabulary of 128"):
        load_reference(tmp_path / "r.safetensors")


def test_a_value_that_is_not_finite_is_named(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    tensors["logits"][1, 2, 3] = np.nan
    save_file(tensors, tmp_path / "r.safetensors", metadata=METADATA)
    with pytest.raises(CheckpointError, match="holds a value in 'logits' that is not finite"):
        load_reference(tmp_path / "r.safetensors")


def test_prompts_of_unequal_length_are_refused(tiny_checkpoint: Path) -> None:
    prompts = [np.zeros(3, np.int64), np.zeros(4, np.int64)]
    with pytest.raises(CheckpointError, match=r"must be of one length, not \[\(3,\), \(4,\)\]; cut them"):
        compute_reference(tiny_checkpoint, prompts=prompts)


def test_a_model_with_too_few_positions_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 40}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"has 40 positions, but a reference of 16 prompt and 32 greedy .* needs 48"
    ):
        compute_reference(folder)


def test_without_torch_the_extra_is_named(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        MissingDependencyError, match=r"running the model needs the package 'torch'.*losa-export\[train\]"
    ):
        compute_reference(tiny_checkpoint)


def test_a_child_process_gives_the_same_answers(reference: Reference, tiny_checkpoint: Path, tmp_path: Path) -> None:
    apart = compute_reference_apart(tiny_checkpoint, tmp_path / "r.safetensors")
    assert apart.model_id == reference.model_id
    assert np.array_equal(apart.prompts, reference.prompts)
    # the child may use another number of threads, hence another order of the float32 sums
    assert np.abs(apart.logits - reference.logits).max() < 1e-5 * np.abs(reference.logits).max()


@pytest.fixture(scope="module")
def rounded(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pruned checkpoint, and a folder exported from it with int8 weights."""
    from losa_export.export import ExportConfig, export_onnx

    folder = tmp_path_factory.mktemp("rounded")
    shutil.copytree(tiny_checkpoint, folder / "checkpoint")
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensor[np.abs(tensor) < np.quantile(np.abs(tensor), 0.6)] = 0
    save_file(tensors, folder / "checkpoint" / "model.safetensors", metadata={"format": "pt"})
    export_onnx(
        ExportConfig(folder / "checkpoint", folder / "onnx", values="int8", smoothing=0, gate=False, progress=False)
    )
    return folder / "checkpoint", folder / "onnx"


def test_rounded_weights_take_the_place_of_the_checkpoints(rounded: tuple[Path, Path], tmp_path: Path) -> None:
    """The same answers as a checkpoint in which the rounded weights were written."""
    from losa_export.graph.external import check_external_data
    from losa_export.graph.stored import read_weights

    checkpoint, exported = rounded
    stored = dict(read_weights(check_external_data(exported)))
    assert len(stored) == 2 * 7 + 1  # each linear of two blocks, and the tied table
    source = load_file(checkpoint / "model.safetensors")
    assert all(np.any(source[name] != weight) for name, weight in stored.items())
    shutil.copytree(checkpoint, tmp_path / "written")
    save_file(source | stored, tmp_path / "written" / "model.safetensors", metadata={"format": "pt"})
    expected = compute_reference(tmp_path / "written")
    found = compute_reference(checkpoint, exported=exported)
    assert np.array_equal(found.logits, expected.logits)
    assert np.array_equal(found.greedy, expected.greedy)
    assert not np.array_equal(found.logits, compute_reference(checkpoint).logits)
    apart = compute_reference_apart(checkpoint, tmp_path / "r.safetensors", exported=exported)
    # the child may use another number of threads, hence another order of the float32 sums
    assert np.abs(apart.logits - expected.logits).max() < 1e-5 * np.abs(expected.logits).max()


def test_rounded_weights_of_another_checkpoint_are_refused(rounded: tuple[Path, Path], tmp_path: Path) -> None:
    other = shutil.copytree(rounded[0], tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    for name in tensors:
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = tensors[name][:160].copy()
        elif "down_proj" in name:
            tensors[name] = tensors[name][:, :160].copy()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((other / "config.json").read_text()) | {"intermediate_size": 160}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"gate_proj.weight' as \(176, 64\), the checkpoint's is \(160, 64\)"):
        compute_reference(other, exported=rounded[1])


def test_a_failing_child_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeFailureError, match=r"could not be computed by torch: checkpoint folder '.*' does not exist"
    ):
        compute_reference_apart(tmp_path / "gone", tmp_path / "r.safetensors")
    assert not (tmp_path / "r.safetensors").exists()


def test_a_child_that_takes_too_long_is_stopped(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailureError, match=r"took more than 0\.01 s; give it more time"):
        compute_reference_apart(tiny_checkpoint, tmp_path / "r.safetensors", timeout_s=0.01)


def test_the_child_needs_two_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["only"]) == 2
    assert "usage: python -m losa_export.reference MODEL OUT [EXPORTED]" in capsys.readouterr().err
