"""What the operators mean, in standard ONNX ones: parts of the function bodies that every format shares.

An engine without our library inlines a body. All inputs of a node but the first are constants, so it folds all but
the products into plain matrices at load. Until the folding is over it holds the result of every step for every
weight, which is why the bodies look up mask bytes rather than bits, turn and cut matrices while their elements are
narrow, and widen them last: some 30 to 40 bytes a weight pass. NonZero and ScatterND would not be folded at all, and
decode anew at each call.

Activations are float32 throughout. Our kernels round them to 16 or 8 bits for int8 and int4 weights, so there the
two differ by that rounding.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from losa_export.graph.formats.base import BLOCK_ROWS
from losa_export.graph.nodes import NodeList

# For each byte its bits, and how many of them are set.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.int32)
_COUNTS = _BITS.sum(axis=1, dtype=np.int32)


class Sizes:
    """Sizes of the calling node's weight, from its attributes N, K and group; each a vector of one int64."""

    def __init__(self, nodes: NodeList, step_columns: int) -> None:
        self._nodes = nodes
        self.rows, self.columns = nodes.reference("N"), nodes.reference("K")
        self.blocks = self._parts(self.rows, nodes.integers(BLOCK_ROWS))
        self.steps = self._parts(self.columns, nodes.integers(step_columns))
        self.padded_rows = nodes.add("Mul", [self.blocks, nodes.integers(BLOCK_ROWS)])

    def groups(self) -> ir.Value:
        """Number of groups of columns that share a scale."""
        return self._parts(self.columns, self._nodes.reference("group"))

    def group_of_columns(self) -> ir.Value:
        """The group of each column: (K,) int64."""
        return self._nodes.add("Div", [count_up(self._nodes, self.columns), self._nodes.reference("group")])

    def _parts(self, whole: ir.Value, part: ir.Value) -> ir.Value:
        less = self._nodes.add("Sub", [self._nodes.add("Add", [whole, part]), self._nodes.integers(1)])
        return self._nodes.add("Div", [less, part])


def kept_levels(
    nodes: NodeList, mask: ir.Value, levels: ir.Value, *, step_columns: int, even_steps: bool, level_type: ir.DataType
) -> ir.Value:
    """The level of each weight, zero where it is pruned.

    Args:
        nodes: where to append.
        mask: as stored.
        levels: (stored,), those of the kept weights in layout order; perhaps some more.
        step_columns: ks.
        even_steps: whether each step stores an even number of levels.
        level_type: of `levels`.

    Returns: (steps, ks, blocks, 2·ks, 8/ks), which is in order of columns, then rows.
    """
    # As many zeros follow the levels. A pruned weight's place lies that much further on, so somewhere among them.
    count = nodes.add("Shape", [levels])
    zeros = nodes.add("ConstantOfShape", [count], {"value": ir.tensor(np.zeros(1, dtype=np.uint8))})
    padded = nodes.add("Concat", [levels, nodes.add("Cast", [zeros], {"to": level_type})], {"axis": 0})
    pruned = nodes.add("Cast", [count], {"to": ir.DataType.INT32})
    by_step = nodes.add("Cast", [nodes.add("Transpose", [mask], {"perm": [1, 0, 2]})], {"to": ir.DataType.INT32})
    # Which bits of a byte belong to a column of the step depends on the column: each has a table of its own.
    tables = nodes.constant(np.arange(0, 256 * step_columns, 256, dtype=np.int32).reshape(1, -1, 1, 1))
    keys = nodes.add("Add", [nodes.add("Unsqueeze", [by_step, nodes.integers(1)]), tables])
    kept, rank = _kept_and_rank(step_columns)
    ranks = nodes.add("Where", [nodes.constant(kept), nodes.constant(rank), pruned])
    before = _values_before(nodes, mask, even_steps)
    return nodes.add("Gather", [padded, nodes.add("Add", [nodes.add("Gather", [ranks, keys]), before])])


def matrices(nodes: NodeList, by_column: ir.Value, sizes: Sizes, parts: int) -> list[ir.Value]:
    """Elements in order of columns, then of rows in blocks, as `parts` matrices (K, N) whose blocks alternate.

    Of something that has fewer columns, such as scales, all are taken.
    """
    ends = nodes.add("Concat", [sizes.columns, sizes.rows], {"axis": 0})
    if parts == 1:
        wholes = [by_column]
    else:
        alternating = [nodes.integers(-1), sizes.blocks, nodes.integers(parts, BLOCK_ROWS)]
        shaped = nodes.add("Reshape", [by_column, nodes.add("Concat", alternating, {"axis": 0})])
        wholes = nodes.add_many("Split", [shaped], [None] * parts, {"axis": 2, "num_outputs": parts})
    shape = nodes.add("Concat", [nodes.integers(-1), sizes.padded_rows], {"axis": 0})
    flat = [nodes.add("Reshape", [whole, shape]) for whole in wholes]
    return [nodes.add("Slice", [one, nodes.integers(0, 0), ends]) for one in flat]


def every_position(nodes: NodeList, levels: ir.Value, sizes: Sizes, step_columns: int) -> ir.Value:
    """Levels of a dense weight, in stored order and with padding, as (steps, ks, blocks, 16)."""
    shape = [sizes.blocks, sizes.steps, nodes.integers(BLOCK_ROWS, step_columns)]
    of_step = nodes.add("Mul", [sizes.padded_rows, nodes.integers(step_columns)])
    stored = nodes.add("Mul", [sizes.steps, of_step])
    used = nodes.add("Slice", [levels, nodes.integers(0), stored])
    shaped = nodes.add("Reshape", [used, nodes.add("Concat", shape, {"axis": 0})])
    return nodes.add("Transpose", [shaped], {"perm": [1, 3, 0, 2]})


def scales_by_column(nodes: NodeList, scales: ir.Value, sizes: Sizes, parts: int) -> list[ir.Value]:
    """Scales (row blocks, groups, 16) float16 as one matrix (K, N) float32 for each of the weight's parts."""
    wide = nodes.add("Cast", [scales], {"to": ir.DataType.FLOAT})
    by_group = matrices(nodes, nodes.add("Transpose", [wide], {"perm": [1, 0, 2]}), sizes, parts)
    group_of_columns = sizes.group_of_columns()
    return [nodes.add("Gather", [one, group_of_columns]) for one in by_group]


def row_elements(nodes: NodeList, ids: ir.Value, values: ir.Value, sizes: Sizes, width: int) -> ir.Value:
    """Stored elements of some rows of a dense weight, found without unfolding the others.

    Args:
        nodes: where to append.
        ids: (…) int64, the rows.
        values: as stored, a row's elements of a step beside each other.
        sizes: of the weight.
        width: stored elements of one row in one step.

    Returns: (…, steps · width).
    """
    first = _place_of_row(nodes, ids, sizes.steps)
    begin = nodes.add("Mul", [first, nodes.integers(width)])
    element = count_up(nodes, nodes.add("Mul", [sizes.steps, nodes.integers(width)]))
    step = nodes.add("Div", [element, nodes.integers(width)])
    # From one step to the next lie the elements of the block's 15 other rows.
    offset = nodes.add("Add", [element, nodes.add("Mul", [step, nodes.integers((BLOCK_ROWS - 1) * width)])])
    return nodes.add("Gather", [values, nodes.add("Add", [begin, offset])])


def row_scales(nodes: NodeList, ids: ir.Value, scales: ir.Value, sizes: Sizes) -> ir.Value:
    """Scale of each column of some rows: (…, K) float32."""
    first = _place_of_row(nodes, ids, sizes.groups())
    offset = nodes.add("Mul", [sizes.group_of_columns(), nodes.integers(BLOCK_ROWS)])
    flat = nodes.add("Reshape", [scales, nodes.integers(-1)])
    found = nodes.add("Gather", [flat, nodes.add("Add", [first, offset])])
    return nodes.add("Cast", [found], {"to": ir.DataType.FLOAT})


def count_up(nodes: NodeList, count: ir.Value) -> ir.Value:
    """0, 1, … count - 1, for `count` a vector of one."""
    return nodes.add("Range", [nodes.integer(0), nodes.add("Squeeze", [count]), nodes.integer(1)])


def swiglu(nodes: NodeList, x: ir.Value, gate: ir.Value, up: ir.Value, output: str) -> ir.Value:
    """silu(x · gate) ⊙ (x · up), for matrices (K, N)."""
    gated = nodes.add("MatMul", [x, gate])
    silu = nodes.add("Mul", [gated, nodes.add("Sigmoid", [gated])])
    return nodes.add("Mul", [silu, nodes.add("MatMul", [x, up])], output=output)


def skip_norm(nodes: NodeList, x: ir.Value, skip: ir.Value, gamma: ir.Value, output: str) -> tuple[ir.Value, ir.Value]:
    """RMS norm of x + skip with the calling node's epsilon, and the sum, which is called `output`."""
    total = nodes.add("Add", [x, skip], output=output)
    normed = nodes.add("RMSNormalization", [total, gamma], {"axis": -1, "stash_type": 1})
    nodes.refer("epsilon", ir.AttributeType.FLOAT)
    return normed, total


def _place_of_row(nodes: NodeList, ids: ir.Value, entries: ir.Value) -> ir.Value:
    """Where some rows begin in a tensor (blocks, entries, 16, …), counted in its last axes: (…, 1) for ids (…)."""
    rows = nodes.add("Unsqueeze", [ids, nodes.integers(-1)])
    block, lane = (nodes.add(op_type, [rows, nodes.integers(BLOCK_ROWS)]) for op_type in ("Div", "Mod"))
    of_block = nodes.add("Mul", [entries, nodes.integers(BLOCK_ROWS)])
    return nodes.add("Add", [nodes.add("Mul", [block, of_block]), lane])


def _kept_and_rank(step_columns: int) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
    """For each column of a step, each mask byte and each of its rows: the bit, and how many before it are set.

    Returns: (ks · 256, 8/ks) each.
    """
    ranks = np.cumsum(_BITS, axis=1, dtype=np.int32) - _BITS
    shape = (256, 8 // step_columns, step_columns)
    kept, rank = (table.reshape(shape).transpose(2, 0, 1).reshape(-1, shape[1]) for table in (_BITS, ranks))
    return kept.astype(np.bool_), np.ascontiguousarray(rank)


def _values_before(nodes: NodeList, mask: ir.Value, even_steps: bool) -> ir.Value:
    """For each mask byte the number of values stored before its first: (steps, 1, blocks, 2·ks, 1) int32."""
    counts = nodes.add("Gather", [nodes.constant(_COUNTS), nodes.add("Cast", [mask], {"to": ir.DataType.INT32})])
    if even_steps:
        in_step = nodes.add("ReduceSum", [counts, nodes.integers(-1)], {"keepdims": 0})
        odd = nodes.add("Mod", [in_step, nodes.integer(2, np.int32)])
        before_step = _running_total(nodes, nodes.add("Add", [in_step, odd]))
        inside = nodes.add("CumSum", [counts, nodes.integer(2)], {"exclusive": 1})
        before = nodes.add("Add", [nodes.add("Unsqueeze", [before_step, nodes.integers(-1)]), inside])
    else:
        before = _running_total(nodes, counts)
    by_step = nodes.add("Transpose", [before], {"perm": [1, 0, 2]})
    return nodes.add("Unsqueeze", [by_step, nodes.integers(1, -1)])


def _running_total(nodes: NodeList, counts: ir.Value) -> ir.Value:
    """The sum of all elements before each, in row-major order."""
    flat = nodes.add("Reshape", [counts, nodes.integers(-1)])
    total = nodes.add("CumSum", [flat, nodes.integer(0)], {"exclusive": 1})
    return nodes.add("Reshape", [total, nodes.add("Shape", [counts])])
