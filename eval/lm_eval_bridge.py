"""lm-evaluation-harness' own command line, with our runtimes among its models.

``python -m losa_export.eval.lm_eval_bridge --model losa --model_args onnx=DIR,runtime=ort,threads=2 --tasks arc_easy``
is `lm_eval` with the model 'losa' added; all other words mean what they mean there. lm-eval finds models by import
alone, so its own command cannot be told of one. From Python, `import losa_export.eval.lm_eval_model` is enough.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from losa_export.errors import LosaError, MissingDependencyError


def main(argv: Sequence[str] | None = None) -> int:
    """Run lm-eval's command line. Returns: the exit code."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except LosaError as error:
        sys.stderr.write(f"losa: error: {error}\n")
        return error.exit_code
    return 0


def run(argv: Sequence[str]) -> None:
    """lm-eval's command line with the model 'losa'.

    Raises: MissingDependencyError if lm-eval is not installed, and what our runtimes raise.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise MissingDependencyError.for_extra("lm_eval", "lm-eval", "lm-eval's command line") from error
    import losa_export.eval.lm_eval_model  # noqa: F401  (registers the model)

    # It reads its words from there and nowhere else.
    kept, sys.argv = sys.argv, ["lm_eval", *argv]
    try:
        cli_evaluate()
    finally:
        sys.argv = kept


if __name__ == "__main__":
    sys.exit(main())
