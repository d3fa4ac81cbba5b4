"""Times and sizes as people write them."""

from __future__ import annotations

import re

_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "": 1.0}
_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# A bare letter is the binary unit, as for systemd, Docker and Kubernetes' Ki without its i.
_BYTES |= {"K": 2**10, "M": 2**20, "G": 2**30}


def seconds_of(text: str) -> float:
    """Seconds of 90, 90s, 10m, 10min or 1.5h. Raises: ValueError that says how to write one."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d+)?)\s*(s|m|min|h|)\s*", text)
    if not match:
        raise ValueError("must be a duration such as 90s, 10m or 1.5h")
    return float(match[1]) * _SECONDS[match[2]]


def bytes_of(text: str) -> int:
    """Bytes of 1000, 512M, 2G or 1.5GiB; KB, MB and GB are decimal. Raises: ValueError that says how to write one."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _BYTES:
        raise ValueError("must be a size such as 1000000, 512M, 2G or 1.5GiB")
    return int(float(match[1]) * _BYTES[match[2].upper()])
