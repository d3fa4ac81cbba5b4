"""The description that the server gives of itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runtimes.serve.conftest import Running

Serve = Callable[..., Running]


def test_every_reference_leads_somewhere_and_every_route_is_told(serve: Serve) -> None:
    running = serve()
    with urllib.request.urlopen(running.url + "/openapi.json") as response:
        document: dict[str, Any] = json.load(response)
    written = json.dumps(document)
    for name in re.findall(r'"#/components/schemas/(\w+)"', written):
        assert name in document["components"]["schemas"]
    assert set(document["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{name}",
        "/health/live",
        "/health/ready",
        "/metrics",
    }
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"type": "null"} in fields["temperature"]["anyOf"]
    assert "anyOf" not in fields["messages"]


def test_schemathesis_finds_no_fault(serve: Serve, tmp_path: Path) -> None:
    beside = Path(sys.executable).with_name("schemathesis")
    program = str(beside) if beside.is_file() else shutil.which("schemathesis")
    if program is None:
        pytest.skip("needs schemathesis, which is not installed")
    running = serve(context_tokens=32)
    found = subprocess.run(
        [
            *(program, "run", running.url + "/openapi.json", "-n", "30", "--seed", "1", "--no-color"),
            *("--phases", "coverage,fuzzing", "--continue-on-failure"),
            # What the schema allows may still be too long for the model.
            *("--exclude-checks", "positive_data_acceptance"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stdout[-3000:]
