"""Open an exported folder in ONNX Runtime, and say in our own errors what it says in its own.

Two ways to open one file: with our custom op library, whose kernels then win over the function bodies that the file
carries, or stock, where ONNX Runtime inlines the bodies and folds each sparse weight into a dense one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import onnxruntime as ort

from losa_export.checkpoint import read_json_if_any
from losa_export.errors import CheckpointError, FormatError, KernelError, LosaError, RuntimeFailureError
from losa_export.onnx_file import MODEL_FILE, check_references
from losa_export.onnx_logits import with_first_logit
from losa_export.onnx_outputs import with_outputs
from losa_export.runtimes import native

_FATAL = 4  # log severity: errors arrive as exceptions, so the log lines beside them would only repeat
_SPARSE_DOMAIN = "losa.sparse"


@dataclass(frozen=True)
class SessionOptions:
    """How a session is opened.

    Attributes:
        threads: within one operation; operations run one after another.
        custom_op: register our kernels.
        prepack: let ONNX Runtime copy dense weights into its fastest layout; costs memory and load time.
        stop_spinning: let threads stop waiting busily when a run returns: for a process that has other work between
            two runs, or several sessions, whose threads would else take each other's processors.
        outputs: begin of the names of those outputs that are computed; '' is all of them.
        choose_logits: let an input say from which token on logits are computed, where the graph is one of ours.
    """

    threads: int
    custom_op: bool
    prepack: bool = True
    stop_spinning: bool = False
    outputs: str = ""
    choose_logits: bool = False


@dataclass(frozen=True)
class OpenSession:
    """An inference session and what is known about it.

    Attributes:
        session: onnxruntime.InferenceSession on the CPU.
        kernel_row: row of our kernel table that computes sparse nodes, None if none does.
        settings: `genai_config.json` of the folder, {} if absent.
    """

    session: Any
    kernel_row: str | None
    settings: Mapping[str, Any]


def open_session(folder: Path, options: SessionOptions) -> OpenSession:
    """Check the folder, then load `model.onnx`.

    Raises: CheckpointError, UnsafePathError, FormatError, KernelError, RuntimeFailureError.
    """
    path = folder / MODEL_FILE
    if not path.is_file():
        raise CheckpointError(
            f"'{folder}' has no {MODEL_FILE}, so there is nothing to run; make it with: losa export merged/ -o onnx/",
            path=path,
        )
    references = check_references(folder)
    settings = read_json_if_any(folder / "genai_config.json", mend="export the model again")
    chosen = ort.SessionOptions()
    chosen.log_severity_level = _FATAL
    chosen.intra_op_num_threads = options.threads
    chosen.inter_op_num_threads = 1
    chosen.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    if not options.prepack:
        chosen.add_session_config_entry("session.disable_prepacking", "1")
    if options.stop_spinning:
        chosen.add_session_config_entry("session.force_spinning_stop", "1")
    rewritten = _rewritten(path, options)
    if rewritten is not None:
        chosen.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    row: str | None = None
    if options.custom_op:
        row = native.describe().row  # an unknown LOSA_KERNEL is told here, in our own words
        _register(chosen, native.library_path())
    try:
        session = ort.InferenceSession(rewritten or str(path), chosen, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding has a dozen exception classes with no common base of their own
        _refuse(error, path)
    if not any(domain == _SPARSE_DOMAIN for domain, _ in references.operators):
        row = None  # a dense model: none of our kernels runs
    return OpenSession(session, row, settings)


def _rewritten(path: Path, options: SessionOptions) -> bytes | None:
    """The graph as the options want it; None for the file as it is."""
    try:
        if options.outputs:
            return with_outputs(path.read_bytes(), lambda name: name.startswith(options.outputs))
        return with_first_logit(path.read_bytes()) if options.choose_logits else None
    except ValueError as error:
        what = f"cut to its outputs '{options.outputs}…'" if options.outputs else "read"
        raise FormatError(f"'{path}' cannot be {what}: {error}", path=path) from error


def run_failed(error: Exception, name: str, what: str) -> RuntimeFailureError:
    """The error for a session that failed while it computed `what`."""
    return RuntimeFailureError(
        f"ONNX Runtime failed in {what} on runtime '{name}': {_first_line(error)}; "
        "if memory is short, use a smaller batch or capacity, else export the model again",
        runtime=name,
    )


def _register(options: Any, library: Path) -> None:
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:
        raise KernelError(
            f"ONNX Runtime {ort.__version__} cannot use the kernels in '{library}': {_first_line(error)}; "
            "build them again with: pip install --force-reinstall losa-export",
            path=library,
        ) from error


def _refuse(error: Exception, path: Path) -> NoReturn:
    """Raise the error of ours that fits why the session could not be created."""
    text = str(error)
    kind: type[LosaError] = RuntimeFailureError
    mend = "export the model again, or open the file with onnx.checker to see more"
    message = _first_line(error)
    for prefix, candidate in (("losa.FormatError: ", FormatError), ("losa.KernelError: ", KernelError)):
        # Our kernels' own words, which ONNX Runtime wraps in words of its own.
        if prefix in text:
            kind, message = candidate, text.split(prefix, 1)[1].splitlines()[0].strip()
            mend = "export the model again" if kind is FormatError else "choose another row by LOSA_KERNEL"
            break
    else:
        if type(error).__name__ in ("InvalidProtobuf", "NoSuchFile", "NoModel") or "external" in text.lower():
            kind, mend = CheckpointError, "the file or its data is missing or truncated: copy or export it again"
    raise kind(f"ONNX Runtime {ort.__version__} cannot load '{path}': {message}; {mend}", path=path) from error


def _first_line(error: Exception) -> str:
    """What went wrong, in one line, without the C++ signature that stands before it when a check failed."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    where, status, reason = lines[0].partition("Status Message: ")
    return where + status + reason.rsplit(" was false. ", 1)[-1]
