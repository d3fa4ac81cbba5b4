"""Run an exported graph on a CPU: one protocol, several engines, text generation above them.

Importing this package loads no engine; each is imported when it is asked for by name.
"""

from losa_export.runtimes.base import RUNTIME_NAMES, DecodeState, Runtime, RuntimeDescription, RuntimeName
from losa_export.runtimes.loader import load_runtime

__all__ = ["RUNTIME_NAMES", "DecodeState", "Runtime", "RuntimeDescription", "RuntimeName", "load_runtime"]
