"""The files under deploy/, as far as they can be tried without a cluster, a container or a running systemd."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
UID = 10001


def seconds(text: str) -> float:
    """A number, or a duration such as '10min'."""
    found = re.fullmatch(r"(\d+)(s|min|)", text)
    assert found, text
    return int(found[1]) * {"s": 1, "min": 60, "": 1}[found[2]]


@pytest.fixture(scope="module")
def drain_timeout() -> float:
    settings = pytest.importorskip("losa_export.runtimes.serve.settings")
    return float(settings.ServeSettings().drain_timeout)


# ---- serve.toml ----


def written_settings() -> dict[str, str]:
    """Name → value as it stands behind the #."""
    return dict(re.findall(r"^#(\w+) = (.+)$", (DEPLOY / "serve.toml").read_text(), flags=re.MULTILINE))


def test_the_example_names_every_setting_and_no_other() -> None:
    settings = pytest.importorskip("losa_export.runtimes.serve.settings")
    assert set(written_settings()) == set(settings.ServeSettings.__dataclass_fields__)


def test_the_example_changes_nothing_and_tells_the_defaults(tmp_path: Path) -> None:
    settings = pytest.importorskip("losa_export.runtimes.serve.settings")
    defaults = settings.ServeSettings()
    as_is, origins = settings.load_settings(DEPLOY / "serve.toml", {}, {})
    assert as_is == defaults
    assert origins == {}
    switched_on = tmp_path / "serve.toml"
    switched_on.write_text("".join(f"{name} = {value}\n" for name, value in written_settings().items()))
    found, origins = settings.load_settings(switched_on, {}, {})
    assert set(origins) == set(written_settings())
    for name in written_settings():
        # What has no default of its own stands there with an example.
        if getattr(defaults, name) is not None:
            assert getattr(found, name) == getattr(defaults, name), name


# ---- the unit ----


class _Repeated(dict[str, Any]):
    """Options that stand several times, as lists of their lines."""

    def __setitem__(self, key: str, value: Any) -> None:
        if isinstance(value, list) and key in self:
            self[key].extend(value)
        else:
            super().__setitem__(key, value)


def unit() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(dict_type=_Repeated, strict=False, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read(DEPLOY / "losa-serve.service")
    return parser


def test_the_unit_is_shut_in(drain_timeout: float) -> None:
    service = unit()["Service"]
    wanted = {
        **dict.fromkeys(
            ("DynamicUser", "NoNewPrivileges", "PrivateTmp", "PrivateDevices", "MemoryDenyWriteExecute"), "yes"
        ),
        "ProtectSystem": "strict",
        "CapabilityBoundingSet": "",
        "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
        "SystemCallArchitectures": "native",
        "Restart": "on-failure",
        "EnvironmentFile": "-/etc/losa/serve.env",
    }
    assert {name: service.get(name) for name in wanted} == wanted
    assert "@system-service" in service["SystemCallFilter"]
    assert "~@privileged" in service["SystemCallFilter"]
    assert seconds(service["TimeoutStopSec"]) > drain_timeout
    assert int(service["LimitNOFILE"]) >= 1024
    assert "ORT_DISABLE_TELEMETRY=1" in service["Environment"].splitlines()
    # The server reads /proc/meminfo.
    assert service.get("ProcSubset", "all") == "all"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_unit_and_rates_it_as_safe(tmp_path: Path) -> None:
    copy = tmp_path / "losa-serve.service"
    text = (DEPLOY / "losa-serve.service").read_text()
    # The program is not installed here.
    changed = text.replace("ExecStart=/opt/losa/bin/losa", f"ExecStart={shutil.which('true')}")
    assert changed != text
    copy.write_text(changed)
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=120
    )
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    # Exposure in tenths: 0 is shut in completely, and from 20 on systemd calls a service no longer safe.
    rated = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=20", str(copy)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert rated.returncode == 0, rated.stdout + rated.stderr


# ---- the image ----


def dockerfile() -> list[tuple[str, str]]:
    """Instructions and their arguments, continued lines joined."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word]


def test_the_image_holds_no_compiler_and_runs_as_nobody() -> None:
    instructions = dockerfile()
    starts = [number for number, (word, _) in enumerate(instructions) if word == "FROM"]
    assert [instructions[number][1] for number in starts] == ["python:3.11-slim AS build", "python:3.11-slim"]
    build, last = instructions[starts[0] : starts[1]], instructions[starts[1] :]
    assert any("g++" in rest for word, rest in build if word == "RUN")
    assert not any("apt-get" in rest or "g++" in rest for _, rest in last)
    words = [word for word, _ in last]
    assert "COPY" not in words
    assert "ADD" not in words
    final = dict(last)
    assert final["USER"] == f"{UID}:{UID}"
    assert words.index("USER") > max(number for number, word in enumerate(words) if word == "RUN")
    assert "[serve]" in final["RUN"]
    assert json.loads(final["ENTRYPOINT"]) == ["losa", "serve"]
    assert json.loads(final["CMD"]) == ["/model"]
    assert final["STOPSIGNAL"] == "SIGTERM"


def test_the_image_sets_settings_that_exist() -> None:
    settings = pytest.importorskip("losa_export.runtimes.serve.settings")
    (environment,) = [
        dict(pair.split("=", 1) for pair in shlex.split(rest)) for word, rest in dockerfile() if word == "ENV"
    ]
    found, _ = settings.load_settings(None, environment, {})
    assert (found.host, found.port) == ("0.0.0.0", 8000)
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"


def test_the_health_check_is_a_program_that_asks_for_readiness() -> None:
    (check,) = [rest for word, rest in dockerfile() if word == "HEALTHCHECK"]
    command = json.loads(check[check.index("CMD ") + 4 :])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")
    assert "/health/ready" in command[2]


def test_the_image_is_built_from_all_that_the_wheel_needs_and_nothing_more() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert allowed == {
        *("CMakeLists.txt", "LICENSE", "README.md", "constraints.txt", "pyproject.toml"),
        *("eval", "losa_export", "runtimes", "training"),
    }
    assert all((ROOT / name).exists() for name in allowed)


# ---- Kubernetes ----


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    return {document["kind"]: document for document in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


@pytest.fixture(scope="module")
def pod(manifests: dict[str, Any]) -> dict[str, Any]:
    return dict(manifests["Deployment"]["spec"]["template"]["spec"])


def test_the_parts_find_each_other(manifests: dict[str, Any]) -> None:
    assert set(manifests) == {"Deployment", "PodDisruptionBudget", "Service"}
    deployment = manifests["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["replicas"] == 3
    assert deployment["selector"]["matchLabels"] == labels
    assert manifests["Service"]["spec"]["selector"] == labels
    assert manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert manifests["Service"]["spec"]["type"] == "ClusterIP"
    (spread,) = deployment["template"]["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels
    annotations = deployment["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/scrape"] == "true"
    assert annotations["prometheus.io/path"] == "/metrics"
    (container,) = deployment["template"]["spec"]["containers"]
    (port,) = container["ports"]
    assert annotations["prometheus.io/port"] == str(port["containerPort"]) == "8000"
    assert manifests["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]


def test_a_pod_is_shut_in(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == UID
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert mounts["model"]["readOnly"]
    assert mounts["api-keys"]["readOnly"]
    assert container["args"] == [mounts["model"]["mountPath"]]


def test_a_pod_has_its_cpus_to_itself(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert set(container["resources"]["limits"]) == {"cpu", "memory"}
    assert container["resources"]["limits"]["cpu"].isdecimal()


def test_a_pod_drains_before_it_is_killed(pod: dict[str, Any], drain_timeout: float) -> None:
    (container,) = pod["containers"]
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pause > 0
    assert pod["terminationGracePeriodSeconds"] > pause + drain_timeout
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("liveness", "readiness", "startup")}
    assert paths == {"liveness": "/health/live", "readiness": "/health/ready", "startup": "/health/ready"}


def test_a_pod_sets_settings_that_exist_and_gets_no_others(pod: dict[str, Any], manifests: dict[str, Any]) -> None:
    settings = pytest.importorskip("losa_export.runtimes.serve.settings")
    (container,) = pod["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    found, origins = settings.load_settings(None, environment, {})
    assert len(origins) == len(environment)
    # The keys are a file of the secret.
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert found.api_key_file == Path(mounts["api-keys"]) / "api-keys"
    # A service of this name would set LOSA_SERVE_PORT in its namespace's pods.
    assert pod["enableServiceLinks"] is False
    assert manifests["Service"]["metadata"]["name"] != "losa-serve"
