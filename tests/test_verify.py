"""`losa verify`: what is untouched is confirmed, and whatever is changed is named."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from losa_export import verify as verify_module
from losa_export.errors import (
    CheckpointError,
    InputError,
    LosaError,
    MaskError,
    MissingDependencyError,
    UnsafePathError,
)
from losa_export.export import ExportConfig, export_onnx
from losa_export.files import sha256_of
from losa_export.graph.external import check_external_data
from losa_export.graph.zeros import nonzero_patterns
from losa_export.masks import digest, save_masks
from losa_export.verification import Check, Difference, Verification
from losa_export.verify import verify
from tests.conftest import write_tiny_checkpoint

VALUES = ["fp32", "bf16", "int8", "int4"]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
QKV = "model.layers.0.self_attn.q_proj+k_proj+v_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
FIGURES = {"max_relative_error": 1e-5, "kl_max": 1e-9}
GATE = {
    **dict.fromkeys(("prefill", "decode", "batch3"), FIGURES),
    "greedy": {"tokens": 96, "equal": 95, "tolerated": [{"prompt": 0}]},
    "thresholds": {"max_relative_error": 1e-3, "max_kl": 1e-5},
    "deviation": {"kl_mean": 0.01, "kl_mean_limit": 0.05},
}


def write_merged(folder: Path, seed: int) -> None:
    """A checkpoint pruned to 70 % as a merge leaves it, with kept weights that are zero."""
    write_tiny_checkpoint(folder, seed=seed)
    tensors = load_file(folder / "model.safetensors")
    generator = np.random.default_rng(seed)
    masks, entries = {}, {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            keep = generator.random(tensor.shape) < 0.3
            tensor[~keep] = 0.0
            tensor.flat[np.flatnonzero(keep)[:3]] = 0.0
            masks[name] = keep
            entries[name] = {"zeros": int((~keep).sum()), "kept_zeros": 3, "mask_sha256": digest(keep)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_masks(folder / "masks.safetensors", masks, {})
    (folder / "sparsity.json").write_text(json.dumps({"tensors": entries}))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """merged/ and run/ with the same masks, other-merged/ and other-run/ with others, and an export of each kind."""
    root = tmp_path_factory.mktemp("made")
    for prefix, seed in (("", 3), ("other-", 4)):
        write_merged(root / f"{prefix}merged", seed)
        (root / f"{prefix}run").mkdir()
        shutil.copy(root / f"{prefix}merged" / "masks.safetensors", root / f"{prefix}run")
    for values in VALUES:
        export(root / "merged", root / values, values=values)
    export(root / "merged", root / "dense", weights="dense")
    export(root / "merged", root / "dense-int8", weights="dense", values="int8")
    write_tiny_checkpoint(root / "unpruned-model", seed=5)
    export(root / "unpruned-model", root / "unpruned")
    return root


def export(source: Path, output: Path, **settings: Any) -> None:
    export_onnx(ExportConfig(source, output, smoothing=0, gate=False, progress=False, **settings))


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies one of the folders for a test to spoil."""
    return lambda name: Path(shutil.copytree(made / name, tmp_path / name))


@pytest.fixture
def folder(copy: Callable[[str], Path]) -> Path:
    return copy("fp32")


def found(folder: Path, **sources: Path) -> Verification:
    return verify(folder, show_progress=False, **sources)


def status(result: Verification) -> dict[str, str]:
    return {check.name: check.status for check in result.checks}


def differences(result: Verification) -> dict[str, list[str]]:
    """Name of each check that differs → what."""
    return {check.name: [one.what for one in check.differences] for check in result.checks if check.status == "differs"}


def edit(folder: Path, *path: str | int, value: Any) -> None:
    """Change one value of export.json."""
    change_json(folder / "export.json", *path, value=value)


def change_json(file: Path, *path: str | int, value: Any) -> None:
    record = json.loads(file.read_text())
    table = record
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    file.write_text(json.dumps(record))


def change_byte(folder: Path, tensor: str, place: int, change: Callable[[int], int]) -> None:
    """Change one byte of a stored tensor."""
    stored = check_external_data(folder).tensors[tensor]
    assert stored.path is not None
    with stored.path.open("r+b") as file:
        file.seek(stored.offset + place)
        byte = file.read(1)[0]
        file.seek(stored.offset + place)
        file.write(bytes([change(byte)]))


# ---- untouched ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", VALUES)
def test_an_untouched_export_is_confirmed_against_its_checkpoint_and_its_run(values: str, made: Path) -> None:
    result = found(made / values, merged=made / "merged", run=made / "run")
    assert result.confirmed
    assert status(result) == {
        **dict.fromkeys(["files", "other files", "external data"], "ok"),
        **dict.fromkeys(["zero patterns", "stored values", "sparsity", "total sparsity"], "ok"),
        **dict.fromkeys(["merged zeros", "merged record", "merged masks", "run masks", "merged weights"], "ok"),
        **dict.fromkeys(["gate", "evaluation"], "not checked"),
    }
    assert str(result).splitlines()[-1] == "CONFIRMED, but for what was not checked: gate, evaluation"


def test_the_folder_alone_is_confirmed_and_what_was_not_given_is_said(folder: Path) -> None:
    edit(folder, "gate", value=GATE)
    result = found(folder)
    assert result.confirmed
    left_out = {check.name: check.detail for check in result.checks if check.status == "not checked"}
    assert left_out == dict.fromkeys(["merged checkpoint", "run", "evaluation"], "none was given")


def test_files_alone_are_checked_in_no_time_for_the_zeros(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_open_sources", None)  # a call would fail
    found = verify(folder, files_only=True)
    assert found.confirmed
    assert any(check.name == "zero patterns" and "only files" in str(check) for check in found.checks)
    with (folder / "model.onnx.data").open("r+b") as file:
        file.write(b"\xff")
    assert not verify(folder, files_only=True).confirmed


def test_a_densely_stored_export_is_held_by_its_zeros(made: Path) -> None:
    result = found(made / "dense", merged=made / "merged", run=made / "run")
    assert result.confirmed
    left_out = {check.name: check.detail for check in result.checks if check.status == "not checked"}
    assert left_out.pop("stored values") == "dense matrices have no masks"
    assert set(left_out) == {"gate", "evaluation"}
    detail = next(check.detail for check in result.checks if check.name == "zero patterns")
    assert detail == "digests of 14 matrices from the values that are not zero"


def test_rounded_dense_matrices_and_unpruned_ones_are_not_checked_for_zeros(made: Path) -> None:
    for sources in ({}, {"run": made / "run"}):
        result = found(made / "dense-int8", **sources)
        assert result.confirmed
        reasons = {check.detail for check in result.checks if check.name in ("zero patterns", "run masks")}
        assert reasons == {"its matrices are dense and rounded, and rounding may add zeros"}
    result = found(made / "unpruned")
    assert next(check.detail for check in result.checks if check.name == "zero patterns") == "nothing in it was pruned"
    assert result.confirmed
    # but a run did prune them
    assert "run masks" in differences(found(made / "unpruned", run=made / "run"))


def test_a_rounded_head_does_not_hide_the_zeros_of_dense_matrices(made: Path, tmp_path: Path) -> None:
    export(made / "merged", tmp_path / "onnx", weights="dense", head="int8")
    assert status(found(tmp_path / "onnx", run=made / "run"))["zero patterns"] == "ok"


def test_an_older_dense_export_is_held_against_masks_where_they_are_given(
    copy: Callable[[str], Path], made: Path
) -> None:
    folder = copy("dense")
    record = json.loads((folder / "export.json").read_text())
    del record["zero_patterns"]
    (folder / "export.json").write_text(json.dumps(record))
    result = found(folder)
    assert status(result)["zero patterns"] == "not checked"
    assert "export.json records no zeros of them; export again" in str(result)
    result = found(folder, run=made / "run")
    assert (status(result)["zero patterns"], status(result)["run masks"]) == ("not checked", "ok")


def test_the_same_files_give_the_same_record(made: Path) -> None:
    results = [found(made / "int4", merged=made / "merged").as_dict() for _ in range(2)]
    assert results[0] == results[1]
    assert json.loads(json.dumps(results[0])) == results[0] | {
        "checks": [check | {"differences": list(check["differences"])} for check in results[0]["checks"]]
    }
    assert str(made) not in json.dumps(results[0])


# ---- files ----------------------------------------------------------------------------------------------------------


def test_one_byte_of_the_tokenizer_is_noticed(folder: Path) -> None:
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes().replace(b"cat", b"car", 1))
    result = found(folder)
    assert differences(result) == {"files": ["tokenizer.json"]}
    assert str(result).splitlines()[-1] == "DIFFERS: files (tokenizer.json)"
    assert f"tokenizer.json: sha256 {sha256_of(tokenizer)[:12]}…" in str(result)


def test_one_stored_value_is_noticed(folder: Path) -> None:
    change_byte(folder, f"{QKV}.values", 5, lambda byte: byte ^ 1)
    assert differences(found(folder)) == {"files": ["model.onnx.data"]}


def test_a_missing_file_and_one_of_another_size_are_named(folder: Path) -> None:
    (folder / "genai_config.json").unlink()
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    result = found(folder)
    assert differences(result) == {"files": ["config.json", "genai_config.json"]}
    size = (folder / "config.json").stat().st_size
    assert f"config.json: {size} bytes, {size - 1} in export.json" in str(result)


def test_a_missing_or_truncated_model_leaves_its_zeros_unread(folder: Path, made: Path) -> None:
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-5000])
    for file in (None, folder / "model.onnx", data):
        if file is not None:
            file.unlink()
        result = found(folder, merged=made / "merged", run=made / "run")
        assert set(differences(result)) == {"files", "external data"}
        assert {status(result)[name] for name in ("zero patterns", "merged zeros", "run masks")} == {"not checked"}


@pytest.mark.parametrize("name", ["other.onnx", "weights.data", "chat_template.jinja", "model.safetensors"])
def test_unlisted_files_that_an_engine_would_take_up_are_named(name: str, folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    (folder / name).write_text("new")
    assert differences(found(folder)) == {"other files": [name]}


def test_data_that_the_model_refers_to_must_be_listed(folder: Path) -> None:
    record = json.loads((folder / "export.json").read_text())
    del record["files"]["model.onnx.data"]
    (folder / "export.json").write_text(json.dumps(record))
    assert differences(found(folder)) == {
        "other files": ["model.onnx.data"],
        "external data": ["model.onnx.data", "model_bytes"],
    }


# ---- zeros ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", VALUES)
def test_one_bit_of_a_mask_is_noticed_everywhere(values: str, copy: Callable[[str], Path], made: Path) -> None:
    folder = copy(values)
    change_byte(folder, f"{QKV}.mask", 0, lambda byte: byte ^ 1)
    result = found(folder, merged=made / "merged", run=made / "run")
    named = differences(result)
    if values == "int4":
        named.pop("stored values", None)  # a step of an odd number of codes ends in a filler, which the bit may take up
    else:
        assert named.pop("stored values") == [QKV]
        assert f"{QKV}: its mask asks for" in str(result)
    assert named.pop("merged zeros") == [Q_PROJ]
    assert set(named.pop("sparsity")) == {Q_PROJ}
    assert named == {
        "files": ["model.onnx.data"],
        **{name: [Q_PROJ] for name in ("zero patterns", "merged record", "merged masks", "run masks")},
        "total sparsity": ["sparsity_fraction"],
    }


def load_masks_of(folder: Path) -> dict[str, np.ndarray]:
    from losa_export.masks import load_masks

    return load_masks(folder / "masks.safetensors").read_all()


def test_a_mask_beyond_the_matrix_cannot_be_decoded(copy: Callable[[str], Path], made: Path) -> None:
    folder = copy("fp32")
    change_attribute(folder, "K", 63)
    named = differences(found(folder, run=made / "run"))
    assert "files" in named
    assert any("q_proj" in what for what in named["zero patterns"])
    assert Q_PROJ in named["run masks"]


def change_attribute(folder: Path, name: str, value: int | None) -> None:
    """Set an integer of the first node of our domain, or remove it."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.domain == "losa.sparse")
    attribute = next(one for one in node.attribute if one.name == name)
    if value is None:
        node.attribute.remove(attribute)
    else:
        attribute.i = value
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def test_a_node_without_its_sizes_cannot_be_decoded(folder: Path) -> None:
    change_attribute(folder, "K", None)
    assert QKV in differences(found(folder))["zero patterns"]


def test_block_offsets_must_count_the_bits(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    [tensor] = [one for one in model.graph.initializer if one.name == f"{QKV}.block_offsets"]
    offsets = np.frombuffer(tensor.raw_data, np.int64).copy()
    offsets[1] += 1  # the last, which is the number of values, stays right
    tensor.raw_data = offsets.tobytes()
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    result = found(folder)
    assert differences(result) == {"files": ["model.onnx"], "stored values": [QKV]}
    assert "block_offsets do not count the bits of its mask" in str(result)


@pytest.mark.parametrize("damage", ["operator", "metadata", "garbage"])
def test_a_model_that_cannot_be_read_is_a_difference(damage: str, folder: Path) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.domain == "losa.sparse")
    if damage == "operator":
        node.op_type = "SparseMatMulFuture"
    elif damage == "metadata":
        node.metadata_props[0].value = '[["w", 1e999]]'
    written = b"no model" if damage == "garbage" else model.SerializeToString()
    (folder / "model.onnx").write_bytes(written)
    result = found(folder)
    named = differences(result)
    assert named.pop("files") == ["model.onnx"]
    assert named == {"external data" if damage == "garbage" else "model": ["model.onnx"]}
    assert status(result)["zero patterns"] == "not checked"


def test_damaged_models_never_end_in_a_traceback(folder: Path, made: Path) -> None:
    generator, path = np.random.default_rng(0), folder / "model.onnx"
    whole = path.read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 3):
            damaged[place] = generator.integers(0, 256)
        path.write_bytes(damaged)
        with contextlib.suppress(UnsafePathError):  # a name of the data file that leads elsewhere
            assert not found(folder, run=made / "run").confirmed


# ---- figures of the manifest ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("sparsity_fraction",), 0.75, {"total sparsity": ["sparsity_fraction"]}),
        (("tensors", DOWN, "sparsity_fraction"), 0.75, {"sparsity": [DOWN]}),
        (("tensors", DOWN, "zeros"), 1, {"sparsity": [DOWN]}),
        (("tensors", DOWN, "shape"), [64, 177], {"sparsity": [DOWN]}),
        (("tensors", DOWN, "values"), "int8", {"sparsity": [DOWN]}),
        (("tensors", DOWN, "mask_sha256"), "0" * 64, {"zero patterns": [DOWN]}),
        (("tensors", "invented"), {"mask_sha256": "0" * 64}, {"zero patterns": ["invented"]}),
        (("tensors",), None, {"zero patterns": 14}),
        (("weights",), "dense", {"sparsity": ["weights"]}),
        (("model_bytes",), 1, {"external data": ["model_bytes"]}),
        (("source", "weights_sha256"), "0" * 64, {"merged weights": ["merged"]}),
        (("source",), None, {"merged weights": ["merged"]}),
    ],
)
def test_a_changed_figure_is_named(path: tuple[str, ...], value: Any, expected: Any, folder: Path, made: Path) -> None:
    edit(folder, *path, value=value)
    named = differences(found(folder, merged=made / "merged", run=made / "run"))
    if path == ("tensors",):
        named = {name: len(what) for name, what in named.items()}
    assert named == expected


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("prefill", "max_relative_error"), 2e-3, "prefill max_relative_error"),
        (("batch3", "kl_max"), 2e-5, "batch3 kl_max"),
        (("decode", "kl_max"), float("nan"), "decode kl_max"),
        (("decode", "kl_max"), -1.0, "decode kl_max"),
        (("decode",), None, "decode max_relative_error"),
        (("deviation", "kl_mean"), 0.06, "deviation kl_mean"),
        (("thresholds",), None, "prefill max_relative_error"),
        (("greedy", "equal"), 96, "greedy"),
        (("greedy",), {}, "greedy"),
    ],
)
def test_a_figure_of_the_gate_beyond_its_limit_is_named(
    path: tuple[str, ...], value: Any, expected: str, folder: Path
) -> None:
    edit(folder, "gate", value=GATE)
    assert status(found(folder))["gate"] == "ok"
    edit(folder, "gate", *path, value=value)
    assert differences(found(folder))["gate"][0] == expected


def test_a_gate_without_figures_is_not_checked(folder: Path) -> None:
    edit(folder, "gate", value={"runtime": "ort-stock", "against": None})
    assert status(found(folder))["gate"] == "not checked"


def test_the_total_of_a_graph_by_torch_is_not_checked(folder: Path) -> None:
    edit(folder, "exporter", value="torch")
    assert status(found(folder))["total sparsity"] == "not checked"
    edit(folder, "exporter", value="builder")
    (folder / "config.json").write_text("{}")
    assert status(found(folder))["total sparsity"] == "not checked"


# ---- other checkpoints and runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp32", "int4", "dense"])
def test_another_checkpoint_and_another_run_are_noticed(kind: str, made: Path) -> None:
    named = differences(found(made / kind, merged=made / "other-merged", run=made / "other-run"))
    counts = {name: len(what) for name, what in named.items()}
    assert counts.pop("merged weights") == 1
    assert counts == dict.fromkeys(["merged zeros", "merged record", "merged masks", "run masks"], 14)


def test_a_checkpoint_of_another_shape_lacks_every_weight(made: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "merged", seed=0)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    tensors[Q_PROJ] = tensors[Q_PROJ][:32].copy()
    del tensors[DOWN]
    save_file(tensors, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    for kind in ("fp32", "dense"):
        result = found(made / kind, merged=tmp_path / "merged")
        assert {Q_PROJ, DOWN} <= set(differences(result)["merged zeros"])
        assert "has no weight of shape (64, 64) under this name" in str(result)
        reasons = [check.detail for check in result.checks if check.name in ("merged record", "merged masks")]
        assert reasons == [
            "the merged checkpoint has no sparsity.json",
            "the merged checkpoint has no masks.safetensors",
        ]


@pytest.mark.parametrize("kind", ["fp32", "dense"])
def test_a_zero_that_woke_in_the_checkpoint_is_noticed(kind: str, made: Path, copy: Callable[[str], Path]) -> None:
    merged = copy("merged")
    tensors = load_file(merged / "model.safetensors")
    pruned = np.flatnonzero(~load_masks_of(merged)[DOWN])[0]
    tensors[DOWN].flat[pruned] = 1.0
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    named = differences(found(made / kind, merged=merged))
    assert named == {"merged zeros": [DOWN], "merged weights": ["merged"]}


def test_a_kept_weight_that_became_zero_is_counted(made: Path, copy: Callable[[str], Path]) -> None:
    merged = copy("merged")
    change_json(merged / "sparsity.json", "tensors", DOWN, "kept_zeros", value=2)
    result = found(made / "fp32", merged=merged)
    assert differences(result) == {"merged zeros": [DOWN]}
    assert "3 kept weights are zero, sparsity.json counted 2" in str(result)
    result = found(made / "dense", merged=merged)
    assert differences(result) == {"merged record": [DOWN]}


def test_masks_of_fewer_matrices_leave_pruned_ones_without_a_record(made: Path, tmp_path: Path) -> None:
    masks = load_masks_of(made / "run")
    del masks[DOWN]
    save_masks(tmp_path / "masks.safetensors", masks, {})
    result = found(made / "fp32", run=tmp_path)
    assert differences(result) == {"run masks": [DOWN]}
    assert "pruned in the file" in str(result)


# ---- dense files ----------------------------------------------------------------------------------------------------


def test_a_zero_that_woke_in_a_dense_file_is_noticed(copy: Callable[[str], Path], made: Path) -> None:
    folder = copy("dense")
    stored = f"{QKV}.transposed"
    pruned = np.argwhere(~load_masks_of(made / "run")[Q_PROJ])[0]
    rows = check_external_data(folder).tensors[stored].shape[1]
    change_byte(folder, stored, 4 * (int(pruned[1]) * rows + int(pruned[0])) + 3, lambda _: 0x3F)
    named = differences(found(folder, merged=made / "merged", run=made / "run"))
    assert named.pop("files") == ["model.onnx.data"]
    assert set(named.pop("sparsity")) == {Q_PROJ}
    checks = ["zero patterns", "merged zeros", "merged record", "merged masks", "run masks"]
    assert named == {name: [Q_PROJ] for name in checks}


def test_a_dense_file_must_hold_what_is_recorded(copy: Callable[[str], Path], made: Path) -> None:
    folder = copy("dense")
    edit(folder, "sparsity_fraction", value=0.7)
    assert differences(found(folder)) == {"total sparsity": ["weights"]}
    edit(folder, "sparsity_fraction", value=0)
    edit(folder, "zero_patterns", Q_PROJ, "shape", value=[32, 64])
    assert "model.onnx" in differences(found(folder))["zero patterns"]
    edit(folder, "zero_patterns", Q_PROJ, value=None)
    assert Q_PROJ in differences(found(folder, run=made / "run"))["zero patterns"]


def test_a_dense_file_in_the_place_of_a_sparse_one_has_none_of_its_patterns(folder: Path, made: Path) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(made / "dense" / name, folder)
    result = found(folder, run=made / "run")
    assert {name: len(what) for name, what in differences(result).items()} == {
        "files": 2,
        "zero patterns": 14,
        "run masks": 14,
        "total sparsity": 1,
        "sparsity": 1,
    }
    assert "the file none that can be read" in str(result)


def test_zeros_of_dense_matrices_are_those_of_the_checkpoint(made: Path) -> None:
    source = load_file(made / "merged" / "model.safetensors")
    shapes = {name: weight.shape for name, weight in source.items() if name.endswith("_proj.weight")}
    model = check_external_data(made / "dense")
    patterns = dict(nonzero_patterns(model, shapes))
    assert set(patterns) == set(shapes)
    assert all(np.array_equal(nonzero, source[name] != 0) for name, nonzero in patterns.items())
    # a name that is not asked for leaves its neighbours out with it
    del shapes[Q_PROJ]
    assert len(dict(nonzero_patterns(model, shapes))) == len(patterns) - 3


# ---- evaluation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluation(folder: Path, tmp_path: Path) -> Path:
    """A record of the folder as `losa eval` writes it."""
    names = ("model.onnx", "model.onnx.data", "export.json", "tokenizer.json")
    loss = {"nll": 2.5, "window_nll": [2.0, 3.0], "perplexity": float(np.exp(2.5))}
    ruined = {"nll": 1000.0, "window_nll": [1000.0], "perplexity": None}
    record = {
        "schema": "losa-eval",
        "target": {"folder": "fp32", "sha256": {name: sha256_of(folder / name) for name in names}},
        "texts": [{"name": "wiki", "target": loss, "reference": loss}, {"name": "ruin", "target": ruined}],
    }
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(record))
    return path


def test_an_evaluation_of_the_same_files_is_confirmed(folder: Path, evaluation: Path) -> None:
    result = found(folder, evaluation=evaluation)
    assert result.confirmed
    assert (status(result)["evaluated files"], status(result)["perplexity"]) == ("ok", "ok")
    assert "3 figures from the losses of their windows" in str(result)


def test_an_evaluation_says_what_it_measured(folder: Path, evaluation: Path) -> None:
    from losa_export.eval.evaluation import _identity
    from losa_export.runtimes.ort import OrtRuntime

    with closing(OrtRuntime.load(folder, threads=1, custom_op=False)) as runtime:
        assert _identity(folder, runtime) == json.loads(evaluation.read_text())["target"]["sha256"]


def test_an_evaluation_binds_the_manifest_too(folder: Path, evaluation: Path) -> None:
    edit(folder, "gate", value=GATE)
    assert differences(found(folder, evaluation=evaluation)) == {"evaluated files": ["export.json"]}


def test_an_evaluation_of_something_else_is_noticed(made: Path, folder: Path, evaluation: Path) -> None:
    named = differences(found(made / "int8", evaluation=evaluation))
    assert named == {"evaluated files": ["model.onnx", "model.onnx.data", "export.json"]}
    change_json(evaluation, "target", "sha256", value={"model.safetensors": "0" * 64})
    named = differences(found(folder, evaluation=evaluation))
    assert named == {"evaluated files": ["model.safetensors", "model.onnx"]}
    change_json(evaluation, "target", "sha256", value=None)
    assert status(found(folder, evaluation=evaluation))["evaluated files"] == "not checked"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("perplexity", 12.0),
        ("perplexity", None),
        ("nll", 2.4),
        ("window_nll", [2.0, 2.0]),
        ("window_nll", []),
        ("window_nll", [float("inf"), -float("inf")]),
    ],
)
def test_a_changed_perplexity_is_noticed(key: str, value: Any, folder: Path, evaluation: Path) -> None:
    change_json(evaluation, "texts", 0, "reference", key, value=value)
    assert differences(found(folder, evaluation=evaluation)) == {"perplexity": ["wiki of the reference"]}


# ---- what cannot be used --------------------------------------------------------------------------------------------


def broken(folder: Path, text: str) -> None:
    (folder / "export.json").write_text(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds no JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ("{}", "has the format None, not 'losa-export-1'"),
        ('{"format": "losa-export-1"}', "does not list model.onnx"),
        ('{"format": "losa-export-1", "files": []}', "does not list model.onnx"),
        (
            '{"format": "losa-export-1", "files": {"model.onnx": {"bytes": "1", "sha256": ""}}}',
            "does not list model.onnx",
        ),
        ('{"format": "losa-export-1", "files": {"a": {"bytes": 1, "sha256": ""}}}', "does not list model.onnx"),
    ],
)
def test_a_manifest_that_is_none_is_refused(text: str, message: str, folder: Path) -> None:
    broken(folder, text)
    with pytest.raises(CheckpointError, match=message):
        found(folder)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a\\b", "", "a\0b", "\ud800", "x" * 5000, "sub/../../x"])
def test_hostile_names_in_the_manifest_are_refused(name: str, folder: Path) -> None:
    edit(folder, "files", name, value={"bytes": 1, "sha256": "0" * 64})
    with pytest.raises(UnsafePathError, match=r"outside it|whose name is none"):
        found(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.onnx", "model.onnx.data", "export.json"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_are_refused(name: str, link: Callable[..., None], folder: Path, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    link(tmp_path / "elsewhere", folder / name)
    with pytest.raises(UnsafePathError, match="link"):
        found(folder)


def test_a_model_that_refers_outside_the_folder_is_refused(folder: Path) -> None:
    model = folder / "model.onnx"
    model.write_bytes(model.read_bytes().replace(b"model.onnx.data", b"../../model.dat"))
    with pytest.raises(UnsafePathError, match="outside"):
        found(folder)


def test_folders_and_records_that_are_missing_are_refused(folder: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"exported folder .* does not exist"):
        found(tmp_path / "no")
    with pytest.raises(CheckpointError, match=r"has no export\.json; give a folder that 'losa export' made"):
        found(made / "merged")
    with pytest.raises(InputError, match=r"checkpoint folder .* does not exist"):
        found(folder, merged=tmp_path / "no")
    with pytest.raises(InputError, match=r"run folder .* does not exist"):
        found(folder, run=tmp_path / "no")
    with pytest.raises(MaskError, match=r"masks\.safetensors' does not exist"):
        found(folder, run=folder)
    with pytest.raises(CheckpointError, match=r"has no no\.json; give the file that 'losa eval' wrote"):
        found(folder, evaluation=tmp_path / "no.json")
    with pytest.raises(CheckpointError, match="is no record of an evaluation"):
        found(folder, evaluation=folder / "config.json")


def test_damaged_manifests_never_end_in_a_traceback(folder: Path, made: Path) -> None:
    generator, path = np.random.default_rng(1), folder / "export.json"
    whole = path.read_bytes()
    for _ in range(100):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 2):
            damaged[place] = generator.integers(32, 127)
        path.write_bytes(damaged)
        with contextlib.suppress(LosaError):
            found(folder, merged=made / "merged")


def test_a_damaged_checkpoint_is_refused(folder: Path, copy: Callable[[str], Path]) -> None:
    merged = copy("merged")
    (merged / "sparsity.json").write_text("{")
    with pytest.raises(CheckpointError, match="run 'losa merge' again"):
        found(folder, merged=merged)


# ---- a light machine ------------------------------------------------------------------------------------------------


def test_without_the_readers_of_onnx_files_are_checked_all_the_same(
    folder: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "is_installed", lambda package: package != "onnx_ir")
    result = found(folder)
    assert result.confirmed
    assert status(result)["external data"] == "ok"
    assert "reading them needs the package 'onnx_ir'" in str(result)
    (folder / "tokenizer.json").write_text("{}")
    assert differences(found(folder)) == {"files": ["tokenizer.json"]}
    with pytest.raises(MissingDependencyError, match="'onnx-ir', which is not installed"):
        found(folder, run=made / "run")


def test_nothing_heavy_is_loaded(made: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom losa_export.verify import verify\n"
        "assert not {'onnx', 'onnx_ir', 'safetensors'} & set(sys.modules)\n"
        "folder = Path(sys.argv[1])\n"
        "assert verify(folder / 'int8', merged=folder / 'merged', run=folder / 'run').confirmed\n"
        "assert not {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", code, str(made)], check=False, capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_progress_is_shown_for_large_folders(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verify(folder)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(verify_module, "_PROGRESS_FROM_BYTES", 0)
    verify(folder)
    captured = capsys.readouterr()
    assert "hashing fp32: " in captured.err
    assert "reading zero patterns: 8/8 nodes" in captured.err
    assert captured.out == ""


# ---- what is shown --------------------------------------------------------------------------------------------------


def test_many_differences_are_counted_in_the_text_and_kept_in_the_record() -> None:
    many = [Difference(f"w{number}", "other") for number in range(14)]
    result = Verification("onnx", (Check.judged("run masks", "14 masks", many), Check.judged("files", "2 files", [])))
    lines = str(result).splitlines()
    assert lines[0] == "run masks  differs      14 masks"
    assert lines[1] == "           w0: other"
    assert lines[11] == "           and 4 more"
    assert lines[12] == "files      ok           2 files"
    assert lines[-1] == f"DIFFERS: run masks ({', '.join(f'w{n}' for n in range(10))}, and 4 more)"
    assert len(result.as_dict()["checks"][0]["differences"]) == 14
    assert not result.as_dict()["confirmed"]
