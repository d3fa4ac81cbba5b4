"""Export end to end: what is written, what is refused, and that nothing half-written stays."""

from __future__ import annotations

import errno
import json
import re
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from losa_export import export as export_module
from losa_export import export_gate
from losa_export.checkpoint import open_checkpoint
from losa_export.errors import (
    CheckpointError,
    ConfigError,
    FormatError,
    GateError,
    InputError,
    KernelError,
    LosaError,
    MaskError,
    MissingDependencyError,
    OutputError,
    UnsupportedArchitectureError,
)
from losa_export.export import ExportConfig, export_onnx
from losa_export.export_gate import StoredTypes
from losa_export.files import sha256_of
from losa_export.graph.composed import input_names, products_of
from losa_export.graph.external import ExternalDataWriter, check_external_data
from losa_export.graph.formats import FORMATS, EncodedWeight, int8
from losa_export.graph.stacking import parse, parts_of
from losa_export.graph.stored import read_weights
from losa_export.masks import digest, save_masks
from losa_export.quantise import Int8Weight
from losa_export.reference import Reference, compute_reference, save_reference
from losa_export.runtimes.ort import OrtRuntime
from tests.conftest import write_tiny_checkpoint

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def quick(source: Path, output: Path, **changes: Any) -> ExportConfig:
    return ExportConfig(
        **{"source": source, "output": output, "smoothing": 0, "gate": False, "progress": False} | changes
    )


def manifest(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / "export.json").read_text())
    return parsed


@pytest.fixture
def dense(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A dense checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "dense"))


def prune(folder: Path, *, with_masks: bool = True, density: float = 0.3) -> dict[str, np.ndarray]:
    """Prune all block linears of a checkpoint in place, with a few kept zeros; returns the masks."""
    tensors = load_file(folder / "model.safetensors")
    generator = np.random.default_rng(5)
    masks = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            keep = generator.random(tensor.shape) < density
            tensor[~keep] = 0.0
            if with_masks:
                tensor[np.nonzero(keep)[0][:3], np.nonzero(keep)[1][:3]] = 0.0
            masks[name] = keep
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if with_masks:
        save_masks(folder / "masks.safetensors", masks, {})
        entries = {name: {"mask_sha256": digest(keep)} for name, keep in masks.items()}
        (folder / "sparsity.json").write_text(json.dumps({"tensors": entries}))
    return masks


@pytest.fixture
def sparse(dense: Path, tmp_path: Path) -> Path:
    """A checkpoint pruned to 70 %, with masks and record, that a test may spoil."""
    folder = dense.rename(tmp_path / "sparse")
    prune(folder)
    return folder


@pytest.fixture
def refused(tmp_path: Path) -> Iterator[Callable[..., LosaError]]:
    """Runs an export that must fail, and checks that it left nothing."""

    def run(kind: type[LosaError], message: str, config: ExportConfig) -> LosaError:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(kind, match=message) as caught:
            export_onnx(config)
        assert sorted(tmp_path.rglob("*")) == before
        return caught.value

    return run


# ---- what is written ------------------------------------------------------------------------------------------------


def test_a_dense_checkpoint_becomes_a_dense_folder_with_all_its_parts(dense: Path, tmp_path: Path) -> None:
    report = export_onnx(quick(dense, tmp_path / "onnx"))
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
        "genai_config.json",
        "export.json",
    }
    assert (report.weights, report.types, report.gate) == ("dense", StoredTypes(), None)
    assert "dense, profile ort by builder" in str(report)
    assert "gate: not run" in str(report)


def test_a_sparse_checkpoint_becomes_sparse_by_default_and_keeps_its_pattern(sparse: Path, tmp_path: Path) -> None:
    masks = load_masks_of(sparse)
    report = export_onnx(quick(sparse, tmp_path / "onnx"))
    record = manifest(tmp_path / "onnx")
    assert report.weights == record["weights"] == "sparse"
    assert record["mask_source"] == "masks.safetensors"
    assert {name: entry["mask_sha256"] for name, entry in record["tensors"].items()} == {
        name: digest(keep) for name, keep in masks.items()
    }
    assert report.sparsity_fraction == pytest.approx(1 - np.mean(np.concatenate([m.ravel() for m in masks.values()])))
    assert report.model_bytes < 0.7 * report.dense_bytes
    assert "70.0% zeros" in str(report) or "69.9% zeros" in str(report) or "70.1% zeros" in str(report)


def load_masks_of(folder: Path) -> dict[str, np.ndarray]:
    from losa_export.masks import load_masks

    return load_masks(folder / "masks.safetensors").read_all()


def test_the_written_weights_decode_to_the_checkpoint_bit_for_bit(sparse: Path, tmp_path: Path) -> None:
    export_onnx(quick(sparse, tmp_path / "onnx"))
    opened, masks, source = check_external_data(tmp_path / "onnx"), load_masks_of(sparse), open_checkpoint(sparse)
    nodes = [node for node in opened.proto.graph.node if node.domain == "losa.sparse" and node.metadata_props]
    products = [(node, product) for node in nodes for product in products_of(node.op_type)]
    seen = []
    for node, product in products:
        inputs = dict(zip(input_names(node.op_type), node.input, strict=True))
        tensors = {short: opened.read(inputs[name]) for short, name in product.tensors.items()}
        numbers = {attribute.name: attribute.i for attribute in node.attribute}
        attributes = {short: numbers[name] for short, name in product.attributes.items()}
        swiglu = product.op_type.endswith(FORMATS["fp32"].swiglu_op)
        if swiglu:
            attributes["N"] = 16 * tensors["mask"].shape[0]
        weight, keep = FORMATS["fp32"].decode(EncodedWeight(tensors, attributes))
        metadata = {entry.key: entry.value for entry in node.metadata_props}
        parts = parse(metadata[product.metadata_key], node.name)
        rows = [part.rows for part in parts]
        weights, keeps = (parts_of(stored, rows, interleaved=swiglu) for stored in (weight, keep))
        for part, one_weight, one_keep in zip(parts, weights, keeps, strict=True):
            assert np.array_equal(one_weight, source.read(part.name))
            assert np.array_equal(one_keep, masks[part.name])
            assert np.count_nonzero(one_weight) < np.count_nonzero(one_keep)  # the kept zeros are there
            seen.append(part.name)
    # Of two layers: query, key and value together, output, gate and up together, down. In one node each for attention
    # and the MLP, but for the first attention, whose norm has nothing to add.
    assert (len(products), len(nodes)) == (8, 5)
    assert sorted(seen) == sorted(masks)


def test_zeros_without_stored_masks_are_read_off_the_weights(dense: Path, tmp_path: Path) -> None:
    masks = prune(dense, with_masks=False)
    export_onnx(quick(dense, tmp_path / "onnx"))
    record = manifest(tmp_path / "onnx")
    assert record["mask_source"] == "nonzero"
    assert record["tensors"][Q_PROJ]["mask_sha256"] == digest(masks[Q_PROJ])


def test_few_zeros_do_not_make_a_checkpoint_sparse(dense: Path, tmp_path: Path) -> None:
    prune(dense, with_masks=False, density=0.9)
    assert export_onnx(quick(dense, tmp_path / "onnx")).weights == "dense"
    assert manifest(tmp_path / "onnx")["mask_source"] == "none"


def test_dense_weights_of_a_sparse_checkpoint_answer_the_same(sparse: Path, tmp_path: Path) -> None:
    report = export_onnx(quick(sparse, tmp_path / "dense-onnx", weights="dense"))
    assert report.weights == "dense"
    export_onnx(quick(sparse, tmp_path / "sparse-onnx"))
    tokens = [greedy(tmp_path / name, "ort-stock") for name in ("dense-onnx", "sparse-onnx")]
    assert tokens[0] == tokens[1]


def test_zeros_of_dense_matrices_are_recorded_where_they_are_exact(sparse: Path, tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {"plain": {"weights": "dense"}, "compressed": {}}
    kinds["rounded"] = {"weights": "dense", "values": "int8"}
    for name, settings in kinds.items():
        export_onnx(quick(sparse, tmp_path / name, **settings))
    zeros = manifest(tmp_path / "plain")["zero_patterns"]
    masks, weights = load_masks_of(sparse), load_file(sparse / "model.safetensors")
    assert set(zeros) == set(masks)
    for name, entry in zeros.items():
        assert entry["nonzero_sha256"] == digest(weights[name] != 0)
        assert entry["zeros"] == np.count_nonzero(weights[name] == 0) > np.count_nonzero(~masks[name])
    assert all("zero_patterns" not in manifest(tmp_path / name) for name in ("compressed", "rounded"))


def test_our_kernels_and_the_stock_engine_give_the_same_tokens_from_one_file(sparse: Path, tmp_path: Path) -> None:
    from losa_export.runtimes import native

    try:
        native.library_path()
    except KernelError as error:
        pytest.skip(f"needs the compiled kernels: {error}")
    export_onnx(quick(sparse, tmp_path / "onnx"))
    assert greedy(tmp_path / "onnx", "ort") == greedy(tmp_path / "onnx", "ort-stock")


def greedy(folder: Path, name: Any, count: int = 24) -> list[int]:
    from losa_export.runtimes.loader import load_runtime

    runtime = load_runtime(name, folder, threads=1)
    state = runtime.new_state(1, 64)
    logits = runtime.prefill(state, 0, np.array([5, 6, 7, 8, 9]))[-1]
    tokens = []
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = runtime.decode(state, np.array(tokens[-1:]))[0]
    runtime.close()
    return tokens


def test_genai_opens_the_dense_folder_and_continues_with_the_same_tokens(dense: Path, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="needs the 'bench' extra")
    (dense / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    export_onnx(quick(dense, tmp_path / "onnx"))
    model = genai.Model(str(tmp_path / "onnx"))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=5 + 24, do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(np.array([[5, 6, 7, 8, 9]], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    expected = greedy(tmp_path / "onnx", "ort-stock")
    assert 3 not in expected  # else genai would have stopped there
    assert [int(token) for token in generator.get_sequence(0)][5:] == expected


def test_the_manifest_lists_every_file_with_its_hash(sparse: Path, tmp_path: Path) -> None:
    export_onnx(quick(sparse, tmp_path / "onnx"))
    record = manifest(tmp_path / "onnx")
    others = {path.name for path in (tmp_path / "onnx").iterdir()} - {"export.json"}
    assert set(record["files"]) == others
    for name, entry in record["files"].items():
        assert entry["sha256"] == sha256_of(tmp_path / "onnx" / name)
    assert record["source"]["weights_sha256"] == open_checkpoint(sparse).weights_sha256()
    assert record["gate"] is None
    assert "decodes all sparse weights at load, once" in record["notes"][0]
    assert str(tmp_path) not in json.dumps(record)


def test_two_exports_of_one_checkpoint_are_the_same_bytes(sparse: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        export_onnx(quick(sparse, tmp_path / name))
    assert manifest(tmp_path / "first") == manifest(tmp_path / "second")


def test_an_untied_head_is_exported(tmp_path: Path, dense: Path) -> None:
    tensors = load_file(dense / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    change_config(dense, tie_word_embeddings=False)
    export_onnx(quick(dense, tmp_path / "onnx"))
    assert "lm_head.weight" in check_external_data(tmp_path / "onnx").tensors


def test_overwrite_replaces_a_former_export(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "old").write_text("old")
    export_onnx(quick(dense, tmp_path / "onnx", overwrite=True))
    assert not (tmp_path / "onnx" / "old").exists()
    assert (tmp_path / "onnx" / "model.onnx").exists()


def test_the_memory_of_building_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    sizes, peaks = [], []
    for blocks in (1, 4, 12):  # the first one pays for imports
        source = tmp_path / f"deep{blocks}"
        write_deep_checkpoint(source, blocks)
        sizes.append((source / "model.safetensors").stat().st_size)
        tracemalloc.start()
        export_onnx(quick(source, tmp_path / f"onnx{blocks}"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # nodes and names do grow, by some 70 kilobytes a block; its weights are 2.6 MB
    assert peaks[2] - peaks[1] < 0.1 * (sizes[2] - sizes[1])


def write_deep_checkpoint(folder: Path, blocks: int) -> None:
    from losa_export.architecture import DecoderSpec, tensor_shapes

    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": blocks,
        "num_attention_heads": 8,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    folder.mkdir()
    shapes = tensor_shapes(DecoderSpec.from_config(config, folder))
    generator = np.random.default_rng(0)
    tensors = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


# ---- value types ----------------------------------------------------------------------------------------------------

ROUNDING = ["bf16", "int8", "int4"]
HEAD_OF = {"fp32": "fp32", "bf16": "bf16", "int8": "int8", "int4": "int8"}


def stored_weights(folder: Path) -> dict[str, np.ndarray]:
    return dict(read_weights(check_external_data(folder)))


def logits_of(folder: Path, name: Any = "ort-stock") -> np.ndarray:
    """Of a prompt, and of two steps after it."""
    from losa_export.runtimes.loader import load_runtime

    runtime = load_runtime(name, folder, threads=1)
    state = runtime.new_state(1, 64)
    parts = [runtime.prefill(state, 0, np.array([5, 6, 7, 8, 9]))]
    parts += [runtime.decode(state, np.array([token])) for token in (10, 11)]
    runtime.close()
    return np.concatenate(parts)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def pruned(request: pytest.FixtureRequest, dense: Path, tmp_path: Path) -> Path:
    """A checkpoint pruned to 70 %, its head tied to the embedding or not."""
    folder = dense.rename(tmp_path / "pruned")
    if not request.param:
        untie(folder)
    prune(folder)
    return folder


def untie(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1] * np.float32(1.5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, tie_word_embeddings=False)


@pytest.mark.parametrize("profile", ["ort", "standard"])
@pytest.mark.parametrize("values", ROUNDING)
def test_a_stock_engine_answers_as_the_model_with_the_stored_weights(
    values: str, profile: str, pruned: Path, tmp_path: Path
) -> None:
    report = export_onnx(quick(pruned, tmp_path / "onnx", values=values, profile=profile, group=32))
    assert (report.types.values, report.types.head) == (values, HEAD_OF[values])
    stored = stored_weights(tmp_path / "onnx")
    source = load_file(pruned / "model.safetensors")
    tables = {name for name in source if name in ("model.embed_tokens.weight", "lm_head.weight")}
    assert set(stored) == tables | {name for name in source if "_proj" in name}
    # the same weights in ordinary matrices
    written = Path(shutil.copytree(pruned, tmp_path / "written"))
    save_file(source | stored, written / "model.safetensors", metadata={"format": "pt"})
    export_onnx(quick(written, tmp_path / "dense-onnx", weights="dense", profile=profile))
    # float32 sums of at most 176 terms, in another order, through two blocks
    expected = logits_of(tmp_path / "dense-onnx")
    np.testing.assert_allclose(logits_of(tmp_path / "onnx"), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("values", ROUNDING)
def test_rounded_weights_are_near_the_checkpoints_and_keep_its_patterns(
    values: str, pruned: Path, tmp_path: Path
) -> None:
    export_onnx(quick(pruned, tmp_path / "onnx", values=values))
    masks, source = load_masks_of(pruned), load_file(pruned / "model.safetensors")
    for name, weight in stored_weights(tmp_path / "onnx").items():
        error = np.linalg.norm(weight - source[name]) / np.linalg.norm(source[name])
        # bf16: 2^-9 at most; int8: a step of 1/127 of the largest of a group; int4: a sixteenth of the range
        assert 0 < error < {"bf16": 0.002, "int8": 0.01, "int4": 0.2 if name in masks else 0.01}[values]
        if name in masks:
            assert not weight[~masks[name]].any()
    digests = {name: entry["mask_sha256"] for name, entry in manifest(tmp_path / "onnx")["tensors"].items()}
    assert digests == {name: digest(keep) for name, keep in masks.items()}


def test_a_tied_table_is_stored_once_and_an_untied_one_twice(pruned: Path, tmp_path: Path) -> None:
    export_onnx(quick(pruned, tmp_path / "onnx", values="int8"))
    opened = check_external_data(tmp_path / "onnx")
    nodes = {node.op_type: node for node in opened.proto.graph.node}
    embedding, head = nodes["EmbeddingInt8"], nodes["SkipNormDenseMatMulInt8"]
    tied = open_checkpoint(pruned).config["tie_word_embeddings"]
    assert (embedding.input[1:] == head.input[3:]) is tied
    assert head.output[0] == "logits"
    assert "lm_head.weight" not in opened.tensors
    assert "model.embed_tokens.weight" not in opened.tensors


@pytest.mark.parametrize("head", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("values", ["fp32", "int8"])
def test_the_head_may_be_of_another_type_than_the_values(values: str, head: str, pruned: Path, tmp_path: Path) -> None:
    report = export_onnx(quick(pruned, tmp_path / "onnx", values=values, head=head, group=64))
    record = manifest(tmp_path / "onnx")
    scaled = "int8" in (values, head) or head == "int4"
    embedding = "int8" if head == "int4" else head
    expected = StoredTypes(values, head, embedding, 64 if scaled else None, "int16" if scaled else None)
    assert {name: record[name] for name in asdict(expected)} == asdict(expected)
    assert report.types == expected
    operators = {node.op_type for node in check_external_data(tmp_path / "onnx").proto.graph.node}
    assert ("SkipNormDenseMatMul" + head.capitalize() in operators) is (head != "fp32")
    expected_text = f"sparse {values}, head {head}" + (", embedding int8" if head == "int4" else "")
    assert expected_text + (" (groups of 64, int16 activations)" if scaled else "") in str(report)
    tables = {name for name in stored_weights(tmp_path / "onnx") if "_proj" not in name}
    tied = open_checkpoint(pruned).config["tie_word_embeddings"]
    assert len(tables) == (0 if head == "fp32" else 1 if tied and head == embedding else 2)


@pytest.mark.parametrize("profile", ["ort", "standard"])
@pytest.mark.parametrize(
    ("head", "embedding"), [("int4", "int8"), ("int4", "fp32"), ("fp32", "int8"), ("int8", "int4")]
)
def test_head_and_embedding_of_different_types_are_two_tables(
    head: str, embedding: str, profile: str, pruned: Path, tmp_path: Path
) -> None:
    """The gate computes with what the file holds, so each table must be taken for what it is."""
    types = {"values": "int8", "head": head, "embedding": embedding, "group": 32}
    report = export_onnx(quick(pruned, tmp_path / "onnx", gate=True, profile=profile, **types))
    assert f"head {head}, embedding {embedding} (groups of 32" in str(report)
    assert report.gate is not None
    assert report.gate["against"] == "checkpoint with the stored weights"
    stored = {name for name in stored_weights(tmp_path / "onnx") if "_proj" not in name}
    assert len(stored) == 2 - [head, embedding].count("fp32")
    names = check_external_data(tmp_path / "onnx").tensors
    assert any(name.startswith("lm_head.weight") for name in names)
    assert any(name.startswith("model.embed_tokens.weight") for name in names)
    with pytest.raises(ConfigError, match=r"ExportConfig\.embedding is 'int2'; choose one of auto, fp32"):
        quick(pruned, tmp_path / "onnx", embedding="int2")


def test_activations_are_an_attribute_of_each_product(sparse: Path, tmp_path: Path) -> None:
    export_onnx(quick(sparse, tmp_path / "onnx", values="int4", activations="int8"))
    nodes = [node for node in check_external_data(tmp_path / "onnx").proto.graph.node if node.domain == "losa.sparse"]
    bits = {node.op_type: [item.i for item in node.attribute if "activation_bits" in item.name] for node in nodes}
    assert bits == {
        "SparseMatMulInt4": [8],
        "SkipNormSparseAttentionInt4": [8, 8],
        "SkipNormSparseMLPInt4": [8, 8],
        "SkipNormDenseMatMulInt8": [16],
        "EmbeddingInt8": [],
        "GroupQueryAttention": [],
    }


@pytest.mark.parametrize(
    ("values", "mlp", "group"), [("int4", 128, 128), ("int4", 192, 64), ("int8", 192, 128)], ids=str
)
def test_int4_has_groups_of_64_where_a_width_is_no_multiple_of_128(
    values: str, mlp: int, group: int, tmp_path: Path
) -> None:
    widths = {"hidden_size": 128, "intermediate_size": mlp, "num_attention_heads": 4, "head_dim": 32}
    write_tiny_checkpoint(tmp_path / "dense", seed=0, **widths)
    asked = quick(tmp_path / "dense", tmp_path / "onnx", weights="dense", values=values)
    assert export_onnx(asked).types.group == manifest(tmp_path / "onnx")["group"] == group
    assert export_onnx(replace(asked, output=tmp_path / "asked", group=32)).types.group == 32


@pytest.mark.parametrize("values", ["bf16", "int8", "int4"])
def test_dense_weights_may_be_rounded_too(values: str, sparse: Path, tmp_path: Path) -> None:
    assert export_onnx(quick(sparse, tmp_path / "plain", weights="dense")).types == StoredTypes()
    report = export_onnx(quick(sparse, tmp_path / "rounded", weights="dense", values=values))
    assert (report.weights, report.types.values, report.types.head) == ("dense", values, HEAD_OF[values])
    assert f"dense {values}, head {HEAD_OF[values]}" in str(report)
    operators = {node.op_type for node in check_external_data(tmp_path / "rounded").proto.graph.node if node.domain}
    assert "DenseMatMul" + values.capitalize() in operators
    assert not any(operator.startswith("Sparse") for operator in operators)
    found, expected = stored_weights(tmp_path / "rounded"), load_file(sparse / "model.safetensors")
    assert sum("_proj" in name for name in found) == sum("_proj" in name for name in expected) > 0
    for name, weight in found.items():
        assert np.linalg.norm(weight - expected[name]) < 0.2 * np.linalg.norm(expected[name])
    assert np.isfinite(logits_of(tmp_path / "rounded")).all()


def test_a_dense_checkpoint_is_rounded_on_request(dense: Path, tmp_path: Path) -> None:
    report = export_onnx(quick(dense, tmp_path / "onnx", values="int8"))
    assert (report.weights, report.types.values) == ("dense", "int8")
    assert report.model_bytes < 0.5 * report.dense_bytes


def test_biases_stay_as_they_are(dense: Path, tmp_path: Path) -> None:
    tensors = load_file(dense / "model.safetensors")
    for name, tensor in list(tensors.items()):
        if "_proj" in name:
            tensors[name.replace(".weight", ".bias")] = np.linspace(-1, 1, len(tensor), dtype=np.float32)
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    change_config(dense, attention_bias=True, mlp_bias=True)
    prune(dense)
    export_onnx(quick(dense, tmp_path / "onnx", values="int4"))
    stored = check_external_data(tmp_path / "onnx")
    assert np.array_equal(
        stored.read("model.layers.0.mlp.down_proj.bias"), tensors["model.layers.0.mlp.down_proj.bias"]
    )
    operators = {node.op_type for node in stored.proto.graph.node}
    assert "SparseSwiGLUInt4" not in operators  # gate and up have biases, so they cannot be one node
    assert np.isfinite(logits_of(tmp_path / "onnx")).all()


@pytest.mark.parametrize("name", [Q_PROJ, "model.embed_tokens.weight"])
def test_a_weight_that_its_type_cannot_hold_is_named(
    name: str, dense: Path, tmp_path: Path, refused: Callable[..., LosaError]
) -> None:
    prune(dense)
    tensors = load_file(dense / "model.safetensors")
    tensors[name].flat[np.flatnonzero(tensors[name])[0]] = np.inf
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    stored_as = re.escape(name.replace("q_proj", "q_proj+k_proj+v_proj"))
    message = rf"tensor '{stored_as}' cannot be stored: the weight at row 0, column \d+ is inf"
    refused(FormatError, message, quick(dense, tmp_path / "onnx", values="int8"))


# ---- the gate -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Reference:
    pytest.importorskip("transformers", reason="needs the 'train' extra")
    return compute_reference(tiny_checkpoint)


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = export_gate.is_installed
    monkeypatch.setattr(export_gate, "is_installed", lambda package: package != "torch" and installed(package))


@pytest.mark.parametrize("profile", ["ort", "standard"])
@pytest.mark.usefixtures("without_torch")
def test_the_gate_takes_the_stored_reference_where_torch_is_missing(
    profile: Any, dense: Path, reference: Reference, tmp_path: Path
) -> None:
    save_reference(dense / "reference.safetensors", reference)
    report = export_onnx(quick(dense, tmp_path / "onnx", gate=True, profile=profile))
    figures = manifest(tmp_path / "onnx")["gate"]
    assert figures["reference"] == "stored"
    assert figures["runtime"] == "ort-stock"
    assert figures["prefill"]["argmax_agreement"] == figures["decode"]["argmax_agreement"] == 1.0
    assert figures["greedy"] == {"tokens": 96, "equal": 96, "tolerated": []}
    assert "gate: passed on 'ort-stock'" in str(report)
    assert "96 of 96 greedy tokens equal" in str(report)


def test_the_gate_runs_torch_in_a_process_of_its_own(sparse: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the 'train' extra")
    export_onnx(quick(sparse, tmp_path / "onnx", gate=True))
    figures = manifest(tmp_path / "onnx")["gate"]
    assert figures["reference"] == "torch"
    assert figures["runtime"] in ("ort", "ort-stock")
    assert figures["batch3"]["max_relative_error"] < 1e-4
    assert figures["greedy"]["equal"] == 96


@pytest.mark.usefixtures("without_torch")
def test_a_failing_gate_names_the_output_and_leaves_nothing(
    dense: Path, reference: Reference, tmp_path: Path, refused: Callable[..., LosaError]
) -> None:
    wrong = reference.decode_logits.copy()
    wrong[1, 2, 7] += 1.0
    save_reference(dense / "reference.safetensors", replace(reference, decode_logits=wrong))
    config = quick(dense, tmp_path / "onnx", gate=True)
    refused(GateError, "the first output that diverges is decode with past of prompt 1, step 2, token 7", config)


@pytest.mark.usefixtures("without_torch")
def test_a_reference_of_other_weights_is_refused(
    dense: Path, reference: Reference, tmp_path: Path, refused: Callable[..., LosaError]
) -> None:
    save_reference(dense / "reference.safetensors", replace(reference, model_id="another"))
    refused(CheckpointError, "was computed from other weights", quick(dense, tmp_path / "onnx", gate=True))


@pytest.mark.usefixtures("without_torch")
def test_a_gate_without_any_reference_says_how_to_go_on(
    dense: Path, tmp_path: Path, refused: Callable[..., LosaError]
) -> None:
    error = refused(MissingDependencyError, "torch is not installed and", quick(dense, tmp_path / "onnx", gate=True))
    assert "--no-gate" in str(error)
    assert "losa-export[train]" in str(error)


def test_rounded_weights_are_held_against_the_checkpoint_that_has_them(sparse: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the 'train' extra")
    types = {"values": "int4", "head": "int4", "group": 32, "activations": "int16"}
    report = export_onnx(quick(sparse, tmp_path / "onnx", gate=True, **types))
    figures = manifest(tmp_path / "onnx")["gate"]
    assert (figures["reference"], figures["against"]) == ("torch", "checkpoint with the stored weights")
    worst = max(figures[part]["max_relative_error"] for part in ("prefill", "decode", "batch3"))
    # float32 sums in another order; our kernels also round activations, to 1/65534 of the largest of a group
    assert worst < (1e-4 if figures["runtime"] == "ort-stock" else 1e-3)
    assert figures["greedy"]["equal"] + len(figures["greedy"]["tolerated"]) == 96
    found = figures["deviation"]
    assert found["positions"] == 3 * (16 + 4)
    assert worst < found["max_relative_error"]
    assert 0 < found["kl_mean"] <= found["kl_mean_limit"]
    assert "against checkpoint with the stored weights" in str(report)
    assert "rounding: KL" in str(report)


@pytest.mark.parametrize("activations", ["int16", "int8"])
@pytest.mark.usefixtures("without_torch")
def test_without_torch_rounded_weights_are_held_against_the_stock_engine(
    activations: str, sparse: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="needs the 'train' extra")
    save_reference(sparse / "reference.safetensors", compute_reference(sparse))
    report = export_onnx(quick(sparse, tmp_path / "onnx", gate=True, values="int8", activations=activations))
    figures = manifest(tmp_path / "onnx")["gate"]
    assert figures["reference"] == "stored"
    assert 0 < figures["deviation"]["kl_mean"] <= 0.05
    if figures["runtime"] == "ort":
        assert figures["against"] == "ort-stock on the same file"
        # errors of the activations, 1/65534 or 1/254 of the largest of a group, through two blocks
        low, high = (0, 1e-3) if activations == "int16" else (1e-3, 0.5)
        assert low < figures["prefill"]["max_relative_error"] < high
        assert figures["thresholds"]["max_relative_error"] == (5e-2 if activations == "int16" else 2.0)
    else:
        assert figures["against"] is None
    assert "rounding: KL" in str(report)


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.usefixtures("without_torch")
def test_activations_have_8_bits_where_answers_bear_it(values: str, sparse: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the 'train' extra")
    save_reference(sparse / "reference.safetensors", compute_reference(sparse))
    report = export_onnx(quick(sparse, tmp_path / "onnx", gate=True, values=values))
    record = manifest(tmp_path / "onnx")
    if record["gate"]["runtime"] == "ort-stock":
        assert record["activations"] == "int16"
        return
    choice = record["gate"]["activations_choice"]
    assert record["activations"] == report.types.activations == "int8"
    assert choice["int16_kl_mean"] != choice["int8_kl_mean"] <= choice["int16_kl_mean"] + choice["most_kl_to_add"]
    assert record["gate"]["deviation"]["kl_mean"] == choice["int8_kl_mean"]
    assert choice["int16"]["thresholds"]["max_relative_error"] < record["gate"]["thresholds"]["max_relative_error"]
    assert "activations: int8; KL" in str(report)
    export_onnx(quick(sparse, tmp_path / "asked", values=values, activations="int8"))
    assert (tmp_path / "onnx/model.onnx").read_bytes() == (tmp_path / "asked/model.onnx").read_bytes()


@pytest.mark.parametrize("how", ["too far", "gate"])
@pytest.mark.usefixtures("without_torch")
def test_activations_have_16_bits_where_8_cost_too_much(
    how: str, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="needs the 'train' extra")
    save_reference(sparse / "reference.safetensors", compute_reference(sparse))
    if how == "too far":
        monkeypatch.setattr(export_gate, "_MOST_KL_TO_ADD", -1.0)
    right = export_gate._check_deviation

    def refuses_int8(truth: Reference, runtime: OrtRuntime, types: StoredTypes) -> dict[str, Any]:
        if how == "gate" and types.activations == "int8":
            raise GateError("other answers")
        return right(truth, runtime, types)

    monkeypatch.setattr(export_gate, "_check_deviation", refuses_int8)
    report = export_onnx(quick(sparse, tmp_path / "onnx", gate=True, values="int8"))
    record = manifest(tmp_path / "onnx")
    assert record["activations"] == report.types.activations == "int16"
    if record["gate"]["runtime"] == "ort":
        assert ("int8_error" in record["gate"]["activations_choice"]) is (how == "gate")
        assert re.search(
            "activations: int16; KL .*" + ("with int8 other answers" if how == "gate" else "KL"), str(report)
        )
    export_onnx(quick(sparse, tmp_path / "asked", values="int8", activations="int16"))
    assert (tmp_path / "onnx/model.onnx").read_bytes() == (tmp_path / "asked/model.onnx").read_bytes()


@pytest.mark.usefixtures("without_torch")
def test_without_torch_and_kernels_only_the_deviation_is_known(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="needs the 'train' extra")
    save_reference(sparse / "reference.safetensors", compute_reference(sparse))
    monkeypatch.setattr(export_gate, "_has_native_library", lambda: False)
    report = export_onnx(quick(sparse, tmp_path / "onnx", gate=True, values="bf16"))
    figures = manifest(tmp_path / "onnx")["gate"]
    assert (figures["runtime"], figures["against"]) == ("ort-stock", None)
    assert "prefill" not in figures
    assert "gate: passed" not in str(report)
    assert "rounding: KL" in str(report)


@pytest.mark.usefixtures("without_torch")
def test_broken_rounding_fails_the_gate(
    sparse: Path, tmp_path: Path, refused: Callable[..., LosaError], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="needs the 'train' extra")
    save_reference(sparse / "reference.safetensors", compute_reference(sparse))
    right = int8.quantise_int8

    def scales_of_other_rows(weight: np.ndarray, keep: np.ndarray, group: int) -> Int8Weight:
        found = right(weight, keep, group)
        return replace(found, scales=np.roll(found.scales, 1, axis=0) * np.float16(8))

    monkeypatch.setattr(int8, "quantise_int8", scales_of_other_rows)
    message = r"the weights as stored \(int8, head int8 \(groups of 128, int16 activations\)\) give other answers"
    refused(GateError, message, quick(sparse, tmp_path / "onnx", gate=True, values="int8"))


# ---- what is refused ------------------------------------------------------------------------------------------------


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exporter": "optimum"}, "ExportConfig.exporter is 'optimum'; choose one of auto, builder, torch"),
        ({"profile": "tensorrt"}, "ExportConfig.profile is 'tensorrt'; choose one of auto, ort, standard"),
        ({"weights": "half"}, "ExportConfig.weights is 'half'; choose one of auto, sparse, dense"),
        ({"values": "fp8"}, "ExportConfig.values is 'fp8'; choose one of fp32, bf16, int8, int4"),
        ({"head": "fp8"}, "ExportConfig.head is 'fp8'; choose one of auto, fp32, bf16, int8, int4"),
        ({"activations": "int4"}, "ExportConfig.activations is 'int4'; choose one of auto, int16, int8"),
        ({"group": 100}, "ExportConfig.group is 100; choose one of 32, 64, 128"),
    ],
)
def test_an_impossible_option_names_its_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quick(Path("in"), Path("out"), **changes)


def test_a_missing_folder_is_named(tmp_path: Path, refused: Callable[..., LosaError]) -> None:
    refused(InputError, "'.*nowhere' does not exist", quick(tmp_path / "nowhere", tmp_path / "onnx"))


def test_an_empty_folder_is_named(tmp_path: Path, refused: Callable[..., LosaError]) -> None:
    (tmp_path / "empty").mkdir()
    refused(InputError, "'.*empty' is empty", quick(tmp_path / "empty", tmp_path / "onnx"))


def test_a_checkpoint_without_config_is_named(dense: Path, tmp_path: Path, refused: Callable[..., LosaError]) -> None:
    (dense / "config.json").unlink()
    refused(CheckpointError, "has no config.json", quick(dense, tmp_path / "onnx"))


def test_truncated_weights_are_named(dense: Path, tmp_path: Path, refused: Callable[..., LosaError]) -> None:
    data = (dense / "model.safetensors").read_bytes()
    (dense / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(CheckpointError, "model.safetensors' is truncated or damaged", quick(dense, tmp_path / "onnx"))


def test_an_unsupported_architecture_is_named_with_the_supported(
    dense: Path, tmp_path: Path, refused: Callable[..., LosaError]
) -> None:
    change_config(dense, architectures=["FalconForCausalLM"])
    config = quick(dense, tmp_path / "onnx", exporter="builder")
    error = refused(UnsupportedArchitectureError, "'FalconForCausalLM' is not supported", config)
    assert "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM" in str(error)


def test_a_tensor_of_another_shape_is_named(dense: Path, tmp_path: Path, refused: Callable[..., LosaError]) -> None:
    change_config(dense, intermediate_size=160)
    message = r"gate_proj.weight' in .* is \(176, 64\), but config.json asks for \(160, 64\)"
    refused(CheckpointError, message, quick(dense, tmp_path / "onnx"))


def test_a_missing_tensor_is_named(dense: Path, tmp_path: Path, refused: Callable[..., LosaError]) -> None:
    change_config(dense, tie_word_embeddings=False)
    refused(CheckpointError, "has no tensor 'lm_head.weight'", quick(dense, tmp_path / "onnx"))


def test_an_output_with_something_in_it_needs_overwrite(
    dense: Path, tmp_path: Path, refused: Callable[..., LosaError]
) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "mine").write_text("mine")
    refused(OutputError, "is not empty; add --overwrite", quick(dense, tmp_path / "onnx"))


def test_the_output_may_not_be_the_input(dense: Path, refused: Callable[..., LosaError]) -> None:
    refused(OutputError, "is the input itself", quick(dense, dense, overwrite=True))


def test_a_full_disk_leaves_nothing(
    dense: Path, tmp_path: Path, refused: Callable[..., LosaError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ExternalDataWriter, "add_transposed", full)
    refused(OutputError, "no space left while writing", quick(dense, tmp_path / "onnx"))


def test_sparse_weights_of_a_dense_checkpoint_are_refused(
    dense: Path, tmp_path: Path, refused: Callable[..., LosaError]
) -> None:
    config = quick(dense, tmp_path / "onnx", weights="sparse")
    refused(InputError, "no linear of which 30% are zero: prune it with 'losa train' first", config)


@pytest.mark.parametrize("weights", ["sparse", "dense"])
def test_a_weight_that_woke_under_its_mask_is_refused(
    weights: str, sparse: Path, tmp_path: Path, refused: Callable[..., LosaError]
) -> None:
    tensors = load_file(sparse / "model.safetensors")
    tensors[Q_PROJ][:] = 1.0
    save_file(tensors, sparse / "model.safetensors", metadata={"format": "pt"})
    config = quick(sparse, tmp_path / "onnx", weights=weights)
    refused(MaskError, f"'{Q_PROJ}' is not zero at every position that its mask prunes", config)


def test_masks_of_another_shape_are_refused(sparse: Path, tmp_path: Path, refused: Callable[..., LosaError]) -> None:
    save_masks(sparse / "masks.safetensors", {Q_PROJ: np.ones((32, 64), np.bool_)}, {})
    message = rf"mask for '{Q_PROJ}' is \(32, 64\), its weight is \(64, 64\)"
    refused(MaskError, message, quick(sparse, tmp_path / "onnx"))


def test_masks_of_other_tensors_are_refused(sparse: Path, tmp_path: Path, refused: Callable[..., LosaError]) -> None:
    save_masks(sparse / "masks.safetensors", {"model.norm.weight": np.ones((1, 64), np.bool_)}, {})
    refused(MaskError, "prunes 'model.norm.weight', which is no linear of a block", quick(sparse, tmp_path / "onnx"))


def test_masks_that_the_record_does_not_know_are_refused(
    sparse: Path, tmp_path: Path, refused: Callable[..., LosaError]
) -> None:
    masks = load_masks_of(sparse)
    awake = np.argwhere(~masks[Q_PROJ])[0]
    masks[Q_PROJ][tuple(awake)] = True
    save_masks(sparse / "masks.safetensors", masks, {})
    config = quick(sparse, tmp_path / "onnx")
    refused(MaskError, f"the zero pattern of '{Q_PROJ}' is not the one that sparsity.json records", config)


def test_kept_zeros_are_missed_when_the_masks_are_lost(
    sparse: Path, tmp_path: Path, refused: Callable[..., LosaError]
) -> None:
    (sparse / "masks.safetensors").unlink()
    refused(MaskError, "masks.safetensors is missing or belongs to", quick(sparse, tmp_path / "onnx"))


def test_a_record_without_tensors_is_refused(sparse: Path, tmp_path: Path, refused: Callable[..., LosaError]) -> None:
    (sparse / "sparsity.json").write_text("{}")
    refused(MaskError, "has no table 'tensors'", quick(sparse, tmp_path / "onnx"))


def test_a_missing_package_names_the_extra(
    dense: Path, tmp_path: Path, refused: Callable[..., LosaError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "is_installed", lambda package: package != "onnx_ir")
    error = refused(MissingDependencyError, "'onnx-ir', which is not installed", quick(dense, tmp_path / "onnx"))
    assert "losa-export[export]" in str(error)
