"""Every error that a user can cause or meet, as one tree.

::

    LosaError
    ├── ConfigError                    an option or field is out of range
    ├── MissingDependencyError         an optional package is not installed
    ├── InputError                     something given to us cannot be used
    │   ├── CheckpointError            no config, truncated or mis-shaped tensors
    │   │   └── UnsupportedArchitectureError
    │   ├── MaskError                  masks that do not fit the checkpoint
    │   ├── AdapterError               adapters that do not fit the checkpoint
    │   ├── TextError                  text missing, unreadable or too short
    │   ├── FormatError                a compressed weight that contradicts itself
    │   └── UnsafePathError            a file reference that leaves its folder
    ├── OutputError                    the destination cannot be written
    ├── StateError                     a run that cannot be resumed
    ├── MergeProofError                a merge that would wake a zero or change the function
    ├── GateError                      an exported file that answers differently from its source
    ├── KernelError                    native library missing, or a kernel row that this CPU lacks
    ├── EngineUnavailableError         an inference engine is not installed, or cannot be here
    ├── RuntimeFailureError            an inference engine refused or failed
    └── BenchmarkError                 a measurement that would not mean anything

Each message says what is wrong, where, and the mend. The facts are attributes too, so that a caller
need not parse text. The command line prints the message alone and exits with 1 (2 for usage).
"""

from __future__ import annotations


class LosaError(Exception):
    """Base of every error raised on purpose by losa-export.

    Args:
        message: one sentence of what is wrong and where; the mend after a semicolon or line break.
        **facts: values named in the message, kept as attributes.
    """

    exit_code = 1

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts: dict[str, object] = facts
        for name, value in facts.items():
            setattr(self, name, value)


class ConfigError(LosaError):
    """An option or configuration field is out of its range."""


class MissingDependencyError(LosaError):
    """A package that belongs to an optional extra is not installed."""

    @classmethod
    def for_extra(cls, package: str, extra: str, purpose: str) -> MissingDependencyError:
        """The message for `package`, which `purpose` needs and `extra` installs."""
        return cls(
            f"{purpose} needs the package '{package}', which is not installed; "
            f"install it with: pip install 'losa-export[{extra}]'",
            package=package,
            extra=extra,
        )


class InputError(LosaError):
    """A file, folder or value given to us cannot be used."""


class CheckpointError(InputError):
    """A checkpoint folder is incomplete, truncated or inconsistent."""


class UnsupportedArchitectureError(CheckpointError):
    """The checkpoint is sound, but its model family is not one we build graphs for."""


class MaskError(InputError):
    """Masks do not fit the checkpoint they are applied to."""


class AdapterError(InputError):
    """Low-rank adapters do not fit the checkpoint they are applied to."""


class TextError(InputError):
    """Calibration, tuning or validation text is missing, unreadable or too short."""


class FormatError(InputError):
    """A compressed sparse weight contradicts itself."""


class UnsafePathError(InputError):
    """A file reference is a link, is absolute, or leaves its folder."""


class OutputError(LosaError):
    """The destination cannot be written."""


class StateError(LosaError):
    """A training run cannot be resumed from what is on disk."""


class MergeProofError(LosaError):
    """A merged weight breaks the proof: a zero woke, a kept weight was lost, or the function changed."""


class GateError(LosaError):
    """An exported model does not answer as its source does."""


class KernelError(LosaError):
    """The native library is missing, or a kernel row was asked for that this CPU lacks."""


class EngineUnavailableError(LosaError):
    """An inference engine with an environment of its own is not installed, or cannot be on this machine."""


class RuntimeFailureError(LosaError):
    """An inference engine refused the model or failed while running it."""


class BenchmarkError(LosaError):
    """A measurement that would not mean anything, so none is given."""
