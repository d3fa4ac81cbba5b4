"""Memory that pruning and merging take, against the number of decoder blocks: the commands on random checkpoints.

Run as `python -m losa_export.eval.studies.memory --blocks 2 4 8`; a table for a page comes out on standard output. The
blocks have the shape of Llama 2 7B. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from losa_export.errors import LosaError, RuntimeFailureError
from losa_export.progress import Progress
from losa_export.synth import SHAPES, LlamaShape, SynthConfig, random_words, write_random_checkpoint

_LIKE = "llama-2-7b"

# How often a process's memory is read.
_SECONDS = 0.02
# The command line in a process of its own.
_CODE = "import sys; from losa_export.cli import main; sys.exit(main(sys.argv[1:]))"
_GIB = 1 << 30


@dataclass(frozen=True)
class Usage:
    """What a command took.

    Attributes:
        peak_anonymous_bytes: the most memory of its own that it held: what the system cannot take back.
        peak_resident_bytes: the most that was in memory for it, with the pages of files that it had mapped, which the
            system drops when memory is short.
        seconds: wall time.
    """

    peak_anonymous_bytes: int
    peak_resident_bytes: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """One checkpoint. `checkpoint_bytes` are its bfloat16 weights'; `merge` is None if it was left out."""

    blocks: int
    checkpoint_bytes: int
    train: Usage
    merge: Usage | None


def measure(arguments: Sequence[str]) -> Usage:
    """Run a `losa` command in a process of its own, and watch its memory.

    Raises: RuntimeFailureError with the end of what it printed, if it fails.
    """
    command = [sys.executable, "-P", "-c", _CODE, *arguments]
    started = time.monotonic()
    anonymous = resident = 0
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while child.poll() is None:
                now = _memory(Path(f"/proc/{child.pid}/status"))
                anonymous, resident = max(anonymous, now[0]), max(resident, now[1])
                time.sleep(_SECONDS)
        finally:
            child.kill()
        output.seek(0)
        if child.returncode != 0:
            raise RuntimeFailureError(
                f"'losa {' '.join(arguments)}' failed: {output.read()[-2000:].strip()}", code=child.returncode
            )
    return Usage(anonymous, resident, time.monotonic() - started)


def _memory(status: Path) -> tuple[int, int]:
    """Anonymous memory now, and the peak of all that was resident; zeros for a process that has just ended."""
    try:
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    return tuple(int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "VmHWM"))  # type: ignore[return-value]


def study(shape: LlamaShape, blocks: int, work: Path, options: Sequence[str], *, merges: bool = True) -> Row:
    """Write a checkpoint, prune it without tuning, merge, and clear all of it away.

    Args:
        shape: of the model.
        blocks: how many.
        work: an existing folder; a checkpoint in bfloat16 must fit, and with `merges` one in float32.
        options: further ones for `losa train`.
        merges: False leaves merging out.
    """
    folder = Path(tempfile.mkdtemp(prefix="losa-memory-", dir=work))
    try:
        config = SynthConfig(_LIKE, folder / "model", dtype="bf16", progress=False)
        size = write_random_checkpoint(shape, blocks, config)
        (folder / "text.txt").write_text(random_words(20_000), encoding="utf-8")
        train = ["train", str(folder / "model"), "-o", str(folder / "run"), "--text", str(folder / "text.txt")]
        train += ["--sparsity", "0.5", "--rounds", "1", "--steps", "0", *options]
        merge = ["merge", str(folder / "run"), "-o", str(folder / "merged")]
        return Row(blocks, size, measure(train), measure(merge) if merges else None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| blocks | weights on disk, GiB | prune: own memory, GiB | with mapped files | s | merge: own memory, GiB "
        "| with mapped files | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [str(row.blocks), f"{row.checkpoint_bytes / _GIB:.2f}"]
        for usage in (row.train, row.merge):
            if usage is None:
                cells += ["", "", ""]
                continue
            cells += [f"{usage.peak_anonymous_bytes / _GIB:.2f}", f"{usage.peak_resident_bytes / _GIB:.2f}"]
            cells.append(f"{usage.seconds:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the memory of `losa train --steps 0` and `losa merge`; 0 when done."""
    parser = argparse.ArgumentParser(prog="python -m losa_export.eval.studies.memory", description=main.__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 8], metavar="N", help="default: 2 4 8")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR", help="where checkpoints are written"
    )
    parser.add_argument("--windows", type=int, default=4, metavar="N", help="to calibrate on (default: 4)")
    parser.add_argument("--window", type=int, default=512, metavar="TOKENS", help="of each (default: 512)")
    parser.add_argument("--no-merge", action="store_true", help="prune only")
    parser.add_argument("options", nargs="*", metavar="OPTION", help="after --: further ones for 'losa train'")
    options = parser.parse_args(arguments)
    train = ["--dtype", "bf16", "--window", str(options.window), "--calibration-windows", str(options.windows)]
    rows = []
    with Progress("measuring", len(options.blocks), "checkpoints") as progress:
        for blocks in options.blocks:
            try:
                further = [*train, *options.options]
                rows.append(study(SHAPES[_LIKE], blocks, options.work, further, merges=not options.no_merge))
            except LosaError as error:
                sys.stderr.write(f"losa: error: {error}\n")
                return error.exit_code
            progress.advance(1)
    sys.stdout.write(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
