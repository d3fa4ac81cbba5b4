"""Dense exports rewritten with ONNX Runtime's 4- and 8-bit products."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from losa_export.errors import ConfigError, FormatError, OutputError
from losa_export.runtimes.loader import load_runtime

pytest.importorskip("onnx_ir", reason="needs the extra 'export'")

from losa_export.eval import dense_peer
from losa_export.graph.external import check_external_data


@pytest.fixture(scope="module")
def dense(tiny_checkpoint, tmp_path_factory):
    """A dense export."""
    from losa_export.export import ExportConfig, export_onnx

    folder = tmp_path_factory.mktemp("peer") / "dense"
    export_onnx(ExportConfig(tiny_checkpoint, folder, weights="dense", gate=False, progress=False))
    return folder


def _logits(folder):
    runtime = load_runtime("ort-stock", folder, threads=1)
    try:
        return runtime.prefill(runtime.new_state(1, 16), 0, np.arange(12) % runtime.vocab_size)
    finally:
        runtime.close()


def test_every_product_is_rounded_and_answers_stay_close(dense, tmp_path):
    exact = _logits(dense)
    errors = {}
    for bits in dense_peer.BITS:
        count = dense_peer.quantise_dense(dense, tmp_path / f"int{bits}", bits=bits)
        nodes = check_external_data(tmp_path / f"int{bits}").proto.graph.node
        assert count == sum(node.op_type == "MatMulNBits" for node in nodes) > 0
        assert not any(node.op_type in ("MatMul", "FusedMatMul") for node in nodes)
        found = _logits(tmp_path / f"int{bits}")
        errors[bits] = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert errors[8] < 0.05
    assert errors[8] < errors[4] < 0.5


def test_what_cannot_be_rounded_is_refused(dense, tmp_path):
    with pytest.raises(ConfigError, match="bits is 3"):
        dense_peer.quantise_dense(dense, tmp_path / "out", bits=3)
    dense_peer.quantise_dense(dense, tmp_path / "once")
    with pytest.raises(FormatError, match="has no product with a constant matrix"):
        dense_peer.quantise_dense(tmp_path / "once", tmp_path / "twice")
    with pytest.raises(OutputError):
        dense_peer.quantise_dense(dense, tmp_path / "once")
    assert not (tmp_path / "twice").exists()


def test_the_command_line_reports_errors_without_a_traceback(dense, tmp_path, capsys):
    assert dense_peer.main([str(dense), "-o", str(tmp_path / "out"), "--block", "64"]) == 0
    assert "products in 4 bits" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out")
    assert dense_peer.main([str(tmp_path / "missing"), "-o", str(tmp_path / "out")]) == 1
    assert "losa: error:" in capsys.readouterr().err
