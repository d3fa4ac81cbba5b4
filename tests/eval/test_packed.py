"""Items packed into one pass: the same scores as one by one, whatever they share and however they are packed."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="needs the extra 'export'")

import onnx

from losa_export.errors import RuntimeFailureError
from losa_export.eval import packed, scorer
from losa_export.eval.packed import PackedScorer, TokenTree, scoring_graph
from losa_export.eval.scorer import ItemByItem, open_scorer
from losa_export.eval.zero_shot import Choice
from losa_export.export import ExportConfig, export_onnx
from losa_export.runtimes.loader import load_runtime
from tests.conftest import write_tiny_checkpoint


def item(*pairs: tuple[list[int], list[int]]) -> list[Choice]:
    return [Choice(np.array(context + behind), len(behind)) for context, behind in pairs]


def random_items(seed: int, count: int) -> list[list[Choice]]:
    """Items of 2 to 5 choices that share a beginning of any length, none included, and end alike now and then."""
    generator = np.random.default_rng(seed)

    def tokens(longest: int) -> list[int]:
        return [int(token) for token in generator.integers(4, 40, generator.integers(1, longest))]

    items = []
    for _ in range(count):
        shared, ending = tokens(30), tokens(5)
        own = bool(generator.integers(2))
        choices = [
            (shared + tokens(3) if own else shared, ending if own else tokens(6))
            for _ in range(generator.integers(2, 6))
        ]
        items.append(item(*choices, choices[0]))
    return items


ITEMS = [
    item(([1, 2, 3], [5]), ([1, 2, 3], [6])),
    item(([1, 2], [3]), ([1, 2], [3, 4]), ([1, 2], [3, 4, 5])),
    item(([7], [8]), ([9], [8, 8])),
    *random_items(0, 12),
]


def likelihoods(found: Any) -> list[float]:
    return [score.log_likelihood for row in found for score in row]


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "onnx"
    export_onnx(ExportConfig(tiny_checkpoint, folder, gate=False, progress=False))
    return folder


def test_a_tree_holds_each_beginning_once() -> None:
    tree = TokenTree()
    first, second, other = item(([1, 2, 3], [4, 5]), ([1, 2], [9, 8]), ([2], [3]))
    # all but the last token of each is read; what is behind the places returned is scored
    assert tree.add(first) == [2, 3]
    assert tree.add(second) == [1, 4]
    assert tree.add(other) == [5]
    assert tree.add(first) == [2, 3]
    assert tree.ids == [1, 2, 3, 4, 9, 2]
    assert tree.depths == [0, 1, 2, 3, 2, 0]
    branches = {0: {0}, 1: {0, 1}, 2: {0, 1, 2}, 3: {0, 1, 2, 3}, 4: {0, 1, 4}, 5: {5}}
    assert {row: set(np.flatnonzero(seen).tolist()) for row, seen in enumerate(tree.visible())} == branches


@pytest.mark.parametrize("name", ["ort", "ort-stock"])
@pytest.mark.parametrize("tokens", [1, 40, 10_000])
def test_scores_are_those_of_one_by_one(
    exported: Path, monkeypatch: pytest.MonkeyPatch, name: Any, tokens: int
) -> None:
    monkeypatch.setattr(packed, "PACK_TOKENS", tokens)
    with closing(load_runtime(name, exported, threads=1)) as runtime:
        chosen = open_scorer(runtime, exported)
        assert chosen.method == "packed"
        found, expected = chosen.score(ITEMS), ItemByItem(runtime).score(ITEMS)
    assert [len(row) for row in found] == [len(row) for row in ITEMS]
    # 1e-5: float32, other shapes of the same products
    assert likelihoods(found) == pytest.approx(likelihoods(expected), rel=1e-5)
    assert [[one.greedy for one in row] for row in found] == [[one.greedy for one in row] for row in expected]


@pytest.mark.parametrize(
    "changes",
    [{"tie_word_embeddings": False}, {"model_type": "mistral", "sliding_window": 24}],
    ids=["untied", "sliding window"],
)
def test_other_models_score_alike_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    names = {"architectures": ["MistralForCausalLM"]} if "sliding_window" in changes else {}
    write_tiny_checkpoint(tmp_path / "model", seed=3, **changes, **names)
    export_onnx(ExportConfig(tmp_path / "model", tmp_path / "onnx", gate=False, progress=False))
    with closing(load_runtime("ort-stock", tmp_path / "onnx", threads=1)) as runtime:
        chosen = open_scorer(runtime, tmp_path / "onnx")
        assert chosen.method == "packed"
        found, expected = chosen.score(ITEMS), ItemByItem(runtime).score(ITEMS)
    assert likelihoods(found) == pytest.approx(likelihoods(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["ort", "ort-stock"])
def test_a_model_with_operators_of_our_own_is_packed_too(tiny_checkpoint: Path, tmp_path: Path, name: Any) -> None:
    export_onnx(
        ExportConfig(tiny_checkpoint, tmp_path / "onnx", values="int8", smoothing=0, gate=False, progress=False)
    )
    with closing(load_runtime(name, tmp_path / "onnx", threads=1)) as runtime:
        chosen = open_scorer(runtime, tmp_path / "onnx")
        assert chosen.method == "packed"
        found, expected = chosen.score(ITEMS), ItemByItem(runtime).score(ITEMS)
    # activations of 16 bits, rounded anew where float32 sums differ in their last bits
    assert likelihoods(found) == pytest.approx(likelihoods(expected), rel=1e-4)


def test_an_item_that_fits_no_pass_is_scored_by_the_runtime(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    shared = generator.integers(4, 40, 200).tolist()
    # 200 tokens that are shared and 60 of each are more than the model's 256 positions, though each choice fits
    long = item(*((shared, generator.integers(4, 40, 50).tolist()) for _ in range(3)))
    with closing(load_runtime("ort-stock", exported, threads=1)) as runtime:
        chosen, passes = open_scorer(runtime, exported), []
        assert isinstance(chosen, PackedScorer)
        run = chosen._run
        monkeypatch.setattr(chosen, "_run", lambda tree, places: (passes.append(len(tree.ids)), run(tree, places))[1])
        found, expected = (
            chosen.score([ITEMS[0], long, ITEMS[1]]),
            ItemByItem(runtime).score([ITEMS[0], long, ITEMS[1]]),
        )
    assert likelihoods(found) == pytest.approx(likelihoods(expected), rel=1e-5)
    assert passes == [3, 4]


def test_graphs_without_such_attention_are_scored_item_by_item(
    tiny_checkpoint: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_onnx(ExportConfig(tiny_checkpoint, tmp_path / "onnx", profile="standard", gate=False, progress=False))
    with closing(load_runtime("ort-stock", tmp_path / "onnx", threads=1)) as runtime:
        assert open_scorer(runtime, tmp_path / "onnx").method == "item by item"
    with closing(load_runtime("ort-stock", exported, threads=1)) as runtime:
        monkeypatch.setattr(scorer.importlib.util, "find_spec", lambda _: None)
        assert open_scorer(runtime, exported).method == "item by item"


@pytest.mark.parametrize("change", ["profile", "head", "biased"])
def test_a_graph_of_another_kind_is_left_alone(exported: Path, tmp_path: Path, change: str) -> None:
    model = onnx.load(str(exported / "model.onnx"), load_external_data=False)
    if change == "profile":
        model.metadata_props[0].value = "standard"
    elif change == "head":
        (head,) = (node for node in model.graph.node if "logits" in node.output)
        head.input[1] = model.graph.node[0].output[0]
    else:
        for node in model.graph.node:
            if node.op_type == "GroupQueryAttention":
                node.input.extend([""] * (10 - len(node.input)) + ["bias"])
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert scoring_graph(tmp_path / "model.onnx") is None
    assert scoring_graph(exported / "model.onnx") is not None


def test_a_model_that_breaks_is_named(tmp_path: Path, tiny_checkpoint: Path) -> None:
    from safetensors.numpy import load_file, save_file

    write_tiny_checkpoint(tmp_path / "model", seed=0)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(np.nan)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    export_onnx(ExportConfig(tmp_path / "model", tmp_path / "onnx", gate=False, progress=False))
    with (
        closing(load_runtime("ort-stock", tmp_path / "onnx", threads=1)) as runtime,
        pytest.raises(RuntimeFailureError, match="runtime 'ort-stock' gave NaN or infinite logits"),
    ):
        open_scorer(runtime, tmp_path / "onnx").score(ITEMS)
