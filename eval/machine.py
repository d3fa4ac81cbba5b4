"""The machine behind a number: processor, caches, cores, memory, system and versions.

Nothing here names a host, a user or a folder: the record can be published beside the result.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from losa_export.runtimes.threads import cgroup_quota, thread_limits

# Packages whose version can change a timing or an answer. A missing one is left out.
PACKAGES = (
    "losa-export",
    "numpy",
    "onnxruntime",
    "onnx",
    "onnx-ir",
    "onnxruntime-genai",
    "torch",
    "transformers",
    "tokenizers",
)


@dataclass(frozen=True)
class CacheLevel:
    """One cache as the kernel describes it; `size_bytes` is of one instance, shared by `shared_by` processors."""

    level: int
    kind: str
    size_bytes: int
    shared_by: int


@dataclass(frozen=True)
class MachineRecord:
    """What `bench.json` stores of the machine.

    Attributes:
        cpu_model: as the system names it; "unknown" where it does not.
        cpu_flags: instruction set flags, sorted; empty where the system shows none.
        virtual: whether a hypervisor runs underneath; None where the system shows no flags.
        logical_cpus: processors of the whole machine.
        affinity_cpus: processors this process may run on.
        physical_cores: distinct cores among those.
        cgroup_quota_cpus: processors the control group pays for; None without a limit.
        caches: of the first usable processor.
        governor: frequency governor of the first usable processor; None where there is none to read.
        memory_bytes, memory_available_bytes: total, and free for use when the record was made.
        load_average_1min: runnable threads, mean of the last minute, when the record was made.
        git_revision: commit of this package's source, with "+changes" if edited; None outside a checkout.
    """

    cpu_model: str
    cpu_flags: tuple[str, ...]
    virtual: bool | None
    architecture: str
    logical_cpus: int
    affinity_cpus: int
    physical_cores: int
    cgroup_quota_cpus: float | None
    caches: tuple[CacheLevel, ...]
    governor: str | None
    memory_bytes: int | None
    memory_available_bytes: int | None
    load_average_1min: float | None
    system: str
    kernel: str
    python: str
    packages: dict[str, str] = field(default_factory=dict)
    git_revision: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        fields = asdict(self)
        fields["cpu_flags"] = list(self.cpu_flags)
        fields["caches"] = list(fields["caches"])
        return fields


def machine_record(*, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> MachineRecord:
    """Read this machine. `proc` and `sys` may point elsewhere in tests; what cannot be read is None or empty."""
    limits = thread_limits(proc=proc, sys=sys)
    model, flags = _processor(_read(proc / "cpuinfo") or "")
    memory = _meminfo(_read(proc / "meminfo") or "")
    cpu = sys / "devices/system/cpu" / f"cpu{_first_cpu()}"
    return MachineRecord(
        cpu_model=model or platform.processor() or "unknown",
        cpu_flags=flags,
        virtual="hypervisor" in flags if flags else None,
        architecture=platform.machine(),
        logical_cpus=os.cpu_count() or 1,
        affinity_cpus=limits.affinity,
        physical_cores=limits.physical_cores,
        cgroup_quota_cpus=cgroup_quota(proc=proc, sys=sys),
        caches=_caches(cpu / "cache"),
        governor=_read(cpu / "cpufreq/scaling_governor"),
        memory_bytes=memory.get("MemTotal"),
        memory_available_bytes=memory.get("MemAvailable"),
        load_average_1min=_load_average(proc),
        system=platform.system(),
        kernel=platform.release(),
        python=platform.python_version(),
        packages=package_versions(),
        git_revision=git_revision(Path(__file__).resolve()),
    )


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed versions of `names`, without importing anything."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision(source: Path) -> str | None:
    """Commit of the checkout in which `source` is a tracked file.

    Asking for a tracked file keeps a package installed *inside* somebody else's checkout from
    claiming that checkout's commit.

    Returns: 40 hex digits, followed by "+changes" if tracked files were edited; None without git or checkout.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(source.parent), *arguments], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", source.name) is None:
        return None
    revision = git("rev-parse", "HEAD")
    if not revision:
        return None
    return revision + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def _processor(cpuinfo: str) -> tuple[str | None, tuple[str, ...]]:
    model = re.search(r"^(?:model name|Model|Processor)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return (model[1].strip() if model else None), tuple(sorted(flags[1].split())) if flags else ()


def _meminfo(text: str) -> dict[str, int]:
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _caches(folder: Path) -> tuple[CacheLevel, ...]:
    found = []
    for index in sorted(folder.glob("index*")):
        level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
        scale = re.fullmatch(r"(\d+)([KMG]?)", size or "")
        if level is None or not level.isdigit() or kind is None or scale is None:
            continue
        size_bytes = int(scale[1]) * 1024 ** ("", "K", "M", "G").index(scale[2])
        found.append(CacheLevel(int(level), kind, size_bytes, _count_cpus(_read(index / "shared_cpu_list") or "")))
    return tuple(found)


def _count_cpus(ranges: str) -> int:
    """Processors in a list such as "0-3,8": 5; at least one."""
    total = 0
    for part in filter(None, ranges.split(",")):
        first, _, last = part.partition("-")
        if first.isdigit():
            total += (int(last) if last.isdigit() else int(first)) - int(first) + 1
    return max(1, total)


def _first_cpu() -> int:
    return min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


def _load_average(proc: Path) -> float | None:
    try:
        return float((_read(proc / "loadavg") or "").split()[0])
    except (IndexError, ValueError):
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None
