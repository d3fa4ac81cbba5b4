"""Decoders of families without a builder: followed by torch.onnx, made sparse, and answering as transformers does."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from losa_export import tracing
from losa_export.checkpoint import Checkpoint
from losa_export.errors import (
    CheckpointError,
    ConfigError,
    KernelError,
    MissingDependencyError,
    UnsupportedArchitectureError,
)
from losa_export.export import ExportConfig, ExportReport, export_onnx

# float32 through two blocks: sums of up to 88 terms in another order leave about 1e-6 of logits around 10
TOLERANCE = {"rtol": 0, "atol": 5e-5}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Of each: its own sizes, and the linears in a block.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    # a quarter of each head rotates, and query, key and value are one linear
    "GPTNeoX": ({"rotary_pct": 0.25}, 4),
    # a window in every other block, capped scores, a tied and scaled table
    "Gemma2": ({"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4, "tie_word_embeddings": True}, 7),
    # products of matrices rather than of batches, which torch writes as Gemm
    "OPT": ({"ffn_dim": 88, "word_embed_proj_dim": 40, "do_layer_norm_before": False}, 6),
}


def write(folder: Path, family: str, **changes: Any) -> Any:
    """A random model pruned to 70 % in the linears of its blocks; returns it as transformers loads it."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = getattr(transformers, f"{family}Config")(**SIZES | changes, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
            else:
                tensor.normal_(0, 0.2)
            if "layers" in name and tensor.ndim == 2:
                tensor.mul_(torch.rand_like(tensor) < 0.3)
    model.save_pretrained(folder)
    return model


class Exported:
    """One family's checkpoint, its export and its truth."""

    def __init__(self, family: str, base: Path) -> None:
        changes, self.linears = FAMILIES[family]
        self.family, self.checkpoint, self.folder = family, base / "checkpoint", base / "onnx"
        self._model = write(self.checkpoint, family, **changes)
        self.report = export(self.checkpoint, self.folder, exporter="torch" if family == "OPT" else "auto")
        self.ids = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (3, 9))

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.no_grad():
            answer: NDArray[np.float32] = self._model(torch.from_numpy(ids)).logits.numpy()
        return answer


@pytest.fixture(scope="module", autouse=True)
def _followed_once() -> Iterator[None]:
    """Following a model takes many seconds, so each is followed once; what comes of it is copied."""
    real, known = tracing.trace_decoder, {}

    def remembered(checkpoint: Checkpoint) -> tracing.TracedDecoder:
        key = checkpoint.weights_sha256() + json.dumps(checkpoint.config)
        if key not in known:
            known[key] = real(checkpoint)
        return replace(known[key], model=known[key].model.clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "trace_decoder", remembered)
        yield


def export(source: Path, output: Path, **changes: Any) -> ExportReport:
    return export_onnx(ExportConfig(source, output, **{"gate": False, "progress": False} | changes))


@pytest.fixture(scope="module", params=list(FAMILIES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("neox") / "checkpoint"
    write(folder, "GPTNeoX", **FAMILIES["GPTNeoX"][0])
    return folder


def test_the_choice_is_printed_and_recorded(exported: Exported) -> None:
    assert "profile standard by torch" in str(exported.report)
    manifest = json.loads((exported.folder / "export.json").read_text())
    assert (manifest["exporter"], manifest["profile"], manifest["weights"]) == ("torch", "standard", "sparse")
    assert manifest["source"]["architecture"] == f"{exported.family}ForCausalLM"
    assert {"torch", "transformers", "onnxscript"} <= set(manifest["versions"])


def test_every_linear_of_a_block_is_stored_sparsely_and_defined_in_the_file(exported: Exported) -> None:
    onnx.checker.check_model(str(exported.folder / "model.onnx"))
    model = onnx.load(exported.folder / "model.onnx", load_external_data=False)
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["SparseMatMulFp32"] == 2 * exported.linears
    assert [function.name for function in model.functions] == ["SparseMatMulFp32"]
    assert 0.65 < exported.report.sparsity_fraction < 0.75
    # head and embedding stay matrices; nothing of the wrapper, and no path of this machine, is left
    assert not [item.name for item in model.graph.initializer if item.name.startswith("model.model.")]
    assert b"/losa_export/" not in model.SerializeToString()


@pytest.mark.parametrize("runtime", ["ort", "ort-stock"])
def test_prefill_and_decoding_of_a_batch_answer_as_transformers(exported: Exported, runtime: str) -> None:
    check_answers(exported, exported.folder, runtime, TOLERANCE)


def check_answers(exported: Exported, folder: Path, runtime: str, tolerance: dict[str, float]) -> None:
    """Rows of different length are padded on the left while decoding."""
    from losa_export.runtimes.loader import load_runtime

    try:
        opened = load_runtime(runtime, folder, threads=1)
    except KernelError as error:
        pytest.skip(f"needs the compiled kernels: {error}")
    lengths = (6, 4, 1)
    state = opened.new_state(3, 16)
    for row, length in enumerate(lengths):
        logits = opened.prefill(state, row, exported.ids[row, :length])
        np.testing.assert_allclose(logits, exported.logits(exported.ids[row : row + 1, :length])[0], **tolerance)
        state.reset(row)
        last = opened.prefill(state, row, exported.ids[row, :length], last_only=True)
        np.testing.assert_allclose(last, logits[-1:], **tolerance)
    for step in range(3):
        tokens = np.array([exported.ids[row, length + step] for row, length in enumerate(lengths)])
        decoded = opened.decode(state, tokens)
        for row, length in enumerate(lengths):
            expected = exported.logits(exported.ids[row : row + 1, : length + step + 1])[0, -1]
            np.testing.assert_allclose(decoded[row], expected, **tolerance)
    opened.close()


def test_rounded_tables_and_values_stay_near_the_answers(exported: Exported, tmp_path: Path) -> None:
    report = export(exported.checkpoint, tmp_path / "onnx", exporter="torch", values="bf16")
    assert str(report.types) == "bf16, head bf16"
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["SparseMatMulBf16"] == 2 * exported.linears
    assert (operators["EmbeddingBf16"], operators["DenseMatMulBf16"]) == (1, 1)
    # bf16 keeps 8 bits: a logit of a few tens moves by some tenths
    check_answers(exported, tmp_path / "onnx", "ort-stock", {"rtol": 0, "atol": 1.0})


def test_head_and_embedding_of_different_types_are_two_tables(exported: Exported, tmp_path: Path) -> None:
    """Tied or not. The gate computes with what the file holds."""
    changes = {"values": "fp32", "head": "int8", "embedding": "bf16", "group": 32}
    report = export(exported.checkpoint, tmp_path / "onnx", exporter="torch", gate=True, **changes)
    assert report.gate is not None
    assert report.gate["against"] == "checkpoint with the stored weights"
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    operators = Counter(node.op_type for node in model.graph.node)
    assert (operators["EmbeddingBf16"], operators["DenseMatMulInt8"]) == (1, 1)


def test_dense_weights_are_ordinary_matrices(neox: Path, tmp_path: Path) -> None:
    assert export(neox, tmp_path / "onnx", weights="dense").weights == "dense"
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    assert {item.domain for item in model.opset_import} == {""}


def test_the_gate_compares_with_transformers(neox: Path, tmp_path: Path) -> None:
    report = export(neox, tmp_path / "onnx", gate=True)
    assert report.gate is not None
    assert report.gate["reference"] == "torch"
    assert report.gate["greedy"]["equal"] == report.gate["greedy"]["tokens"]


def test_the_builder_asked_for_by_name_refuses(neox: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="'GPTNeoXForCausalLM' is not supported; supported are"):
        export(neox, tmp_path / "onnx", exporter="builder")


def test_contributed_operators_cannot_be_had(neox: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile is 'ort', but torch.onnx writes standard .*'GPTNeoXForCausalLM'"):
        export(neox, tmp_path / "onnx", profile="ort")


def test_calibration_text_cannot_be_used(neox: Path, tiny_text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"calibration needs a model whose linears are met in a known order"):
        export(neox, tmp_path / "onnx", calibration=(tiny_text,), values="int8")


def test_masks_of_another_model_are_refused(neox: Path, tmp_path: Path) -> None:
    from losa_export.errors import MaskError
    from losa_export.masks import save_masks

    folder = copy(neox, tmp_path)
    save_masks(folder / "masks.safetensors", {"lm_head.weight": np.ones((96, 64), np.bool_)}, {})
    with pytest.raises(MaskError, match=r"prunes 'lm_head.weight', which is no linear of a block"):
        export(folder, tmp_path / "onnx")


def test_a_missing_package_is_named_with_the_family(
    neox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("losa_export.exporters.is_installed", lambda package: package != "onnxscript")
    message = r"'GPTNeoXForCausalLM' is not supported.* needs the package 'onnxscript'.*losa-export\[export-torch\]"
    with pytest.raises(MissingDependencyError, match=message):
        export(neox, tmp_path / "onnx")
    with pytest.raises(MissingDependencyError, match=r"^exporting by torch.onnx needs the package 'onnxscript'"):
        export(neox, tmp_path / "onnx", exporter="torch")


def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_missing_tensor_is_named_and_not_made_up(neox: Path, tmp_path: Path) -> None:
    folder = copy(neox, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks tensor 'gpt_neox.layers.0.mlp.dense_h_to_4h.weight'"):
        export(folder, tmp_path / "onnx")


def test_a_folder_that_transformers_cannot_load_is_named(neox: Path, tmp_path: Path) -> None:
    folder = copy(neox, tmp_path)
    change_config(folder, model_type="nothing")
    with pytest.raises(CheckpointError, match="transformers cannot load the checkpoint"):
        export(folder, tmp_path / "onnx")


def test_a_model_without_keys_and_values_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=96, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    with pytest.raises(UnsupportedArchitectureError, match="do not all keep keys and values of one size"):
        export(tmp_path / "mamba", tmp_path / "onnx")


def test_what_torch_cannot_follow_is_refused_with_its_reason(
    neox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        try:
            raise TypeError("cannot trace this\nand more")
        except TypeError as error:
            raise RuntimeError("export failed") from error

    monkeypatch.setattr("torch.onnx.export", fail)
    folder = copy(neox, tmp_path)
    change_config(folder, max_position_embeddings=63)
    with pytest.raises(
        UnsupportedArchitectureError, match=r"follow a 'GPTNeoX.*': TypeError cannot trace this; another"
    ):
        export(folder, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_tables_that_are_not_found_can_only_be_exact(
    neox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tracing.trace_decoder
    monkeypatch.setattr(tracing, "trace_decoder", lambda checkpoint: replace(real(checkpoint), head=""))
    with pytest.raises(UnsupportedArchitectureError, match="not where they can be rounded; export it with --head fp32"):
        export(neox, tmp_path / "onnx", values="int8")
    assert export(neox, tmp_path / "exact", values="int8", head="fp32").types.head == "fp32"
