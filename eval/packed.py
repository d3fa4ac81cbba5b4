"""Choices of several items in one pass of an exported graph: a tree of tokens in one sequence.

The choices of an item share most of their tokens, and items are short. So the tokens of a few items are laid out as a
tree in which each beginning stands once. The pass reads them as one sequence: each token sees those before it on its
branch alone (`attention_bias`), stands where it would in a text of its own (`position_ids`), and logits are computed
only behind tokens whose successors are scored. ONNX Runtime's own GroupQueryAttention takes such a mask, though exports
leave it out; so the graph is changed in memory. Weights and the kernels that multiply them are the file's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
from numpy.typing import NDArray

from losa_export.errors import RuntimeFailureError
from losa_export.eval.zero_shot import Choice, Score, score
from losa_export.onnx_file import MODEL_FILE
from losa_export.runtimes import native
from losa_export.runtimes.ort import OrtRuntime, bind_shared
from losa_export.runtimes.ort_session import run_failed

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]

# Fewer tokens leave the matrix products waiting for weights; with more, attention between tokens of different items,
# which is computed and thrown away, outweighs that.
PACK_TOKENS = 192
# Beyond this the mask, of tokens times tokens, is larger than what it saves.
LONGEST_TREE = 2048
_FATAL = 4  # log severity, as of the session that the runtime itself has
_COMPOSED = "SparseAttention"  # in the names of operators that hold attention and the products around it
_ATTENTION, _CONTRIB, _WINDOW, _BIAS_INPUT = "GroupQueryAttention", "com.microsoft", "local_window_size", 10
# Added to scores of tokens that are not seen. Not -inf, of which a fused softmax may make NaN.
_UNSEEN = np.float32(-1e30)


class TokenTree:
    """Tokens of some choices, each beginning once; parents stand before their children.

    Attributes:
        ids: of the tokens.
        parents: place of the token before each on its branch, -1 for none.
        depths: how many tokens come before each on its branch.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self._places: dict[tuple[int, int], int] = {}

    def add(self, choice: Choice) -> list[int]:
        """Lay out what the model reads of a choice, all but its last token. Returns: places behind which is scored."""
        place, branch = -1, []
        for token in choice.ids[:-1].tolist():
            depth = self.depths[place] + 1 if place >= 0 else 0
            place = self._places.setdefault((parent := place, token), len(self.ids))
            if place == len(self.ids):
                self.ids.append(token)
                self.parents.append(parent)
                self.depths.append(depth)
            branch.append(place)
        return branch[-choice.scored :]

    def visible(self) -> NDArray[np.bool_]:
        """(T, T), whether the token of a row sees that of a column: itself and those before it on its branch."""
        seen = np.eye(len(self.ids), dtype=bool)
        for place, parent in enumerate(self.parents):
            if parent >= 0:
                seen[place] |= seen[parent]
        return seen


class PackedScorer:
    """Scores items of choices in passes of about `PACK_TOKENS` tokens, by a second session of a runtime's model.

    Args:
        runtime: whose model it is; it is asked for items that do not fit a pass.
        session: of the graph that `scoring_graph` makes.
        longest: tokens that a pass may have.
    """

    method = "packed"

    def __init__(self, runtime: OrtRuntime, session: Any, longest: int) -> None:
        self._runtime = runtime
        self._session = session
        self._longest = longest
        self._logits = np.empty((0, runtime.vocab_size), np.float32)

    @classmethod
    def open(cls, runtime: OrtRuntime, folder: Path) -> PackedScorer | None:
        """A scorer beside `runtime`, which has loaded `folder`; None if its graph has no attention to give a mask to.

        Raises: RuntimeFailureError if ONNX Runtime refuses the changed graph.
        """
        if not runtime.layout.shared or (made := scoring_graph(folder / MODEL_FILE)) is None:
            return None
        graph, window = made
        description = runtime.describe()
        chosen = ort.SessionOptions()
        chosen.log_severity_level = _FATAL
        chosen.intra_op_num_threads = description.threads
        chosen.inter_op_num_threads = 1
        chosen.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
        try:
            if description.details["custom_op"]:
                chosen.register_custom_ops_library(str(native.library_path()))
            session = ort.InferenceSession(graph, chosen, providers=["CPUExecutionProvider"])
        except Exception as error:  # the binding's exception classes share no base of their own
            raise run_failed(error, runtime.name, "loading its graph for scoring") from error
        # A pass begins with a token that nobody sees, hence the 1.
        return cls(runtime, session, min(runtime.max_positions, window, LONGEST_TREE) - 1)

    def score(self, items: Sequence[Sequence[Choice]]) -> list[list[Score]]:
        """What the model makes of the choices of each item.

        Raises: RuntimeFailureError if the runtime fails, or gives NaN or infinity.
        """
        found: list[list[Score]] = []
        for pack in self._packs(items):
            if len(pack) == 1 and _size(pack[0]) > self._longest:
                found.append(score(self._runtime, pack[0]))
            else:
                found += self._pass(pack)
        return found

    def _packs(self, items: Sequence[Sequence[Choice]]) -> Iterator[list[Sequence[Choice]]]:
        """Items in order, as many at once as fit."""
        pack: list[Sequence[Choice]] = []
        tokens = 0
        for item in items:
            size = _size(item)
            if pack and tokens + size > min(PACK_TOKENS, self._longest):
                yield pack
                pack, tokens = [], 0
            pack.append(item)
            tokens += size
        if pack:
            yield pack

    def _pass(self, items: Sequence[Sequence[Choice]]) -> list[list[Score]]:
        tree = TokenTree()
        places = [[tree.add(choice) for choice in item] for item in items]
        scored = sorted({place for item in places for branch in item for place in branch})
        logits = self._run(tree, np.array(scored, np.int64))
        best, normalisers = logits.argmax(axis=1), _log_sums(logits)
        if not np.isfinite(normalisers).all():
            raise RuntimeFailureError(
                f"runtime '{self._runtime.name}' gave NaN or infinite logits; the model or a kernel is broken"
            )
        rows = {place: row for row, place in enumerate(scored)}

        def found(choice: Choice, branch: Sequence[int]) -> Score:
            mine, targets = [rows[place] for place in branch], choice.ids[-choice.scored :]
            logs = logits[mine, targets].astype(np.float64) - normalisers[mine]
            return Score(math.fsum(logs), bool((best[mine] == targets).all()))

        return [
            [found(choice, branch) for choice, branch in zip(item, branches, strict=True)]
            for item, branches in zip(items, places, strict=True)
        ]

    def _run(self, tree: TokenTree, scored: Int64) -> Float32:
        """Logits (len(scored), V) behind those places; overwritten by the next pass."""
        tokens, layout = len(tree.ids), self._runtime.layout
        # Before the tree stands a token of zeros that nobody sees: only behind a past do position_ids count.
        bias = np.full((1, 1, tokens, tokens + 1), _UNSEEN)
        bias[0, 0, :, 1:][tree.visible()] = 0
        shape = (1, layout.kv_heads, tokens + 1, layout.head_dim)
        buffers = [np.zeros(shape, np.float32) for _ in layout.inputs]
        inputs: dict[str, NDArray[np.generic]] = {
            "input_ids": np.array([tree.ids], np.int64),
            "position_ids": np.array([tree.depths], np.int64),
            "attention_mask": np.ones((1, tokens + 1), np.int64),
            "attention_bias": bias,
            "scored": scored,
        }
        if len(self._logits) < len(scored):
            self._logits = np.empty((len(scored), self._runtime.vocab_size), np.float32)
        logits = self._logits[: len(scored)]
        binding = self._session.io_binding()
        bind_shared(binding, layout, buffers)
        for name in (item.name for item in self._session.get_inputs() if item.name in inputs):
            array = inputs[name]
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, (1, *logits.shape), logits.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # as above
            raise run_failed(error, self._runtime.name, "scoring") from error
        return logits


def scoring_graph(path: Path) -> tuple[bytes, int] | None:
    """A model of profile 'ort', its data left where it is, with two inputs more.

    They are `attention_bias`, (1, 1, S, P + S) float32 for all its attention, and `scored`, (N,) int64: places of the
    sequence that logits are computed for.

    Returns: the model, and over how many tokens its attention reaches; None if the graph is not of that kind.
    """
    model = _attention_apart(onnx.load(str(path), load_external_data=False))
    graph = model.graph
    attention = [node for node in graph.node if node.op_type == _ATTENTION]
    heads = [place for place, node in enumerate(graph.node) if "logits" in node.output]
    constants = {tensor.name for tensor in graph.initializer}
    profiles = [entry.value for entry in model.metadata_props if entry.key == "losa.profile"]
    if profiles != ["ort"] or not attention or any(len(node.input) > _BIAS_INPUT for node in attention):
        return None
    if len(heads) != 1:
        return None
    head = graph.node[heads[0]]
    # A head that has its norm inside reads what is added before the norm, too.
    hidden = 2 if head.op_type.startswith("SkipNorm") else 1
    if any(name not in constants for name in head.input[hidden:] if name):
        return None
    for node in attention:
        node.domain = _CONTRIB  # ours takes no mask
        node.input.extend([""] * (_BIAS_INPUT - len(node.input)) + ["attention_bias"])
    for place in range(hidden):
        gathered = f"scored_hidden_{place}"
        graph.node.insert(heads[0], onnx.helper.make_node("Gather", [head.input[place], "scored"], [gathered], axis=1))
        head.input[place] = gathered
    kinds, whole = onnx.TensorProto, ["one", "head", "sequence", "total"]
    graph.input.append(onnx.helper.make_tensor_value_info("attention_bias", kinds.FLOAT, whole))
    graph.input.append(onnx.helper.make_tensor_value_info("scored", kinds.INT64, ["places"]))
    (logits,) = (item for item in graph.output if item.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "places"
    windows = [attribute.i for node in attention for attribute in node.attribute if attribute.name == _WINDOW]
    return model.SerializeToString(), min((window for window in windows if window > 0), default=LONGEST_TREE)


def _attention_apart(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with nodes of its own for attention that is part of others."""
    composed = {node.op_type for node in model.graph.node if _COMPOSED in node.op_type}
    if not composed:
        return model
    return onnx.inliner.inline_selected_functions(model, [("losa.sparse", op_type) for op_type in composed])


def _size(item: Sequence[Choice]) -> int:
    """Tokens that an item's choices take in a tree."""
    tree = TokenTree()
    for choice in item:
        tree.add(choice)
    return len(tree.ids)


def _log_sums(logits: Float32) -> NDArray[np.float64]:
    """Log of the sum of exponentials of each row; exponentials in float32, sums in float64."""
    found = np.empty(len(logits))
    for place, row in enumerate(logits):
        top = row.max()
        found[place] = np.log(np.exp(row - top).sum(dtype=np.float64)) + top
    return found
