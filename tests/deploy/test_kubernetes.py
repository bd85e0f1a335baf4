"""The Kubernetes overlays, as they would be applied."""

from __future__ import annotations

import inspect
import ipaddress
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cloudformation import read as read_template
from dockerfile import parse, words_of
from hypothesis import assume, example, given
from hypothesis import strategies as st
from kustomize import Object, build
from pydantic_settings import CliApp

from cvworker import __version__
from cvworker.addresses import refusal
from cvworker.observe.http import Endpoints
from cvworker.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = ["cpu", "gpu"]
KUBERNETES = "1.31"
METADATA_SERVICES = ["169.254.169.254", "fd00:ec2::254", "169.254.170.2", "169.254.170.23", "168.63.129.16"]

TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
CUSTOM: dict[str, dict[str, Any]] = {
    "ScaledObject": {
        "type": "object",
        "additionalProperties": False,
        "required": ["scaleTargetRef", "triggers"],
        "properties": {
            "scaleTargetRef": {"type": "object", "required": ["name"]},
            "minReplicaCount": {"type": "integer", "minimum": 0},
            "maxReplicaCount": {"type": "integer", "minimum": 1},
            "pollingInterval": {"type": "integer", "minimum": 1},
            "cooldownPeriod": {"type": "integer", "minimum": 0},
            "advanced": {"type": "object"},
            "triggers": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["type", "metadata"],
                    "properties": {
                        "type": {"const": "aws-sqs-queue"},
                        "authenticationRef": {"type": "object", "required": ["name"]},
                        "metadata": {
                            **TEXTS,  # KEDA reads nothing but texts here, numbers included
                            "required": ["queueURLFromEnv", "awsRegion"],
                            "propertyNames": {
                                "enum": [
                                    "queueURLFromEnv",
                                    "awsRegion",
                                    "queueLength",
                                    "activationQueueLength",
                                    "scaleOnInFlight",
                                ]
                            },
                        },
                    },
                },
            },
        },
    },
    "TriggerAuthentication": {
        "type": "object",
        "additionalProperties": False,
        "properties": {"podIdentity": {"type": "object", "properties": {"provider": {"const": "aws"}}}},
    },
    "PodMonitor": {
        "type": "object",
        "additionalProperties": False,
        "required": ["selector", "podMetricsEndpoints"],
        "properties": {
            "selector": {"type": "object", "properties": {"matchLabels": TEXTS}},
            "podMetricsEndpoints": {
                "type": "array",
                "items": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {name: {"type": "string"} for name in ("port", "path", "interval")},
                },
            },
        },
    },
}
VERSIONS = {
    "ScaledObject": "keda.sh/v1alpha1",
    "TriggerAuthentication": "keda.sh/v1alpha1",
    "PodMonitor": "monitoring.coreos.com/v1",
}


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> dict[str, Object]:
    return objects(request.param)


def objects(overlay: str) -> dict[str, Object]:
    """The objects by kind; the second network policy, whose name says more, by its name."""
    built = build(FOLDER / "overlays" / overlay)
    return {
        each["kind"] if each["metadata"]["name"] == "cvworker" else each["metadata"]["name"]: each for each in built
    }


def pod(overlay: dict[str, Object]) -> dict[str, Any]:
    return dict(overlay["Deployment"]["spec"]["template"]["spec"])


def container(overlay: dict[str, Object]) -> dict[str, Any]:
    (found,) = pod(overlay)["containers"]
    return dict(found)


# ---- valid


def test_there_is_one_of_each(overlay: dict[str, Object]) -> None:
    assert set(overlay) == {
        "ServiceAccount",
        "ConfigMap",
        "Deployment",
        "ScaledObject",
        "TriggerAuthentication",
        "PodDisruptionBudget",
        "NetworkPolicy",
        "cvworker-private",
        "PodMonitor",
    }


def test_every_object_is_as_its_schema_says(overlay: dict[str, Object]) -> None:
    for each in overlay.values():
        if each["kind"] in CUSTOM:
            assert each["apiVersion"] == VERSIONS[each["kind"]]
            jsonschema.validate(each["spec"], CUSTOM[each["kind"]])
        else:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_kubectl_makes_the_same_of_it(name: str) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", FOLDER / "overlays" / name], capture_output=True, text=True)
    if "invalid Kustomization" in done.stderr:
        pytest.skip(f"kubectl is too old: {done.stderr.splitlines()[0]}")
    assert (done.returncode, done.stderr) == (0, "")
    text = re.sub(r"cvworker-[a-z0-9]{10}\b", "cvworker", done.stdout)  # the digest of the settings

    def key(each: Object) -> tuple[str, str]:
        return each["kind"], each["metadata"]["name"]

    theirs = sorted(yaml.safe_load_all(text), key=key)
    assert sorted(objects(name).values(), key=key) == theirs


# ---- the worker


def test_the_settings_are_ones_that_a_worker_accepts(
    overlay: dict[str, Object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in overlay["ConfigMap"]["data"].items():
        monkeypatch.setenv(name, value)
        assert not name.startswith(PREFIX) or name.removeprefix(PREFIX).lower() in Settings.model_fields
    settings = CliApp.run(Settings, cli_args=[])
    assert settings.http_host == "0.0.0.0"  # or neither probes nor Prometheus get an answer
    assert settings.http_port == container(overlay)["ports"][0]["containerPort"]
    assert settings.queue_url
    assert settings.module


@pytest.mark.parametrize(("name", "device", "tag"), [("cpu", "cpu", "-cpu"), ("gpu", "cuda", "")])
def test_each_overlay_has_its_device_and_the_image_of_this_version(name: str, device: str, tag: str) -> None:
    overlay = objects(name)
    assert overlay["ConfigMap"]["data"]["CVWORKER_DEVICE"] == device
    assert container(overlay)["image"].endswith(f"/cvworker:{__version__}{tag}")
    limits = container(overlay)["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == ("1" if name == "gpu" else None)
    assert limits["memory"] == container(overlay)["resources"]["requests"]["memory"]


def test_kubernetes_waits_for_the_stop(overlay: dict[str, Object]) -> None:
    grace = float(overlay["ConfigMap"]["data"]["CVWORKER_SHUTDOWN_GRACE"])
    assert grace + 5 <= pod(overlay)["terminationGracePeriodSeconds"] <= grace + 30


def test_probes_ask_what_the_worker_answers(overlay: dict[str, Object]) -> None:
    served = inspect.getsource(Endpoints)
    probes = {kind: container(overlay)[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {kind: probe["path"] for kind, probe in probes.items()} == {
        "startup": "/livez",
        "liveness": "/livez",
        "readiness": "/readyz",
    }
    assert all(f'"{probe["path"]}"' in served and probe["port"] == "http" for probe in probes.values())
    (endpoint,) = overlay["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert f'"{endpoint["path"]}"' in served
    assert endpoint["port"] == container(overlay)["ports"][0]["name"]


def test_pods_are_as_restricted_as_kubernetes_knows(overlay: dict[str, Object]) -> None:
    security = container(overlay)["securityContext"]
    assert security == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod(overlay)["securityContext"]["runAsNonRoot"] is True
    assert pod(overlay)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod(overlay)["automountServiceAccountToken"] is False


def test_user_and_volumes_are_the_images(overlay: dict[str, Object]) -> None:
    worker = next(stage for stage in parse((ROOT / "Dockerfile").read_text()) if stage.name == "worker")
    security = pod(overlay)["securityContext"]
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == worker.all("USER")[-1]
    mounted = [each["mountPath"] for each in container(overlay)["volumeMounts"]]
    assert mounted == [*words_of(worker.all("VOLUME")[0]), "/dev/shm"]
    assert [*words_of(worker.all("ENTRYPOINT")[0])[2:], *container(overlay)["args"]] == ["cvworker", "run"]


def test_everything_selects_the_workers_pods(overlay: dict[str, Object]) -> None:
    labels = overlay["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert overlay["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert overlay["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert overlay["PodMonitor"]["spec"]["selector"]["matchLabels"] == labels
    for name in ("NetworkPolicy", "cvworker-private"):
        assert overlay[name]["spec"]["podSelector"]["matchLabels"] == labels


# ---- how many


def test_keda_scales_the_deployment_on_its_own_queue_to_zero_and_back(overlay: dict[str, Object]) -> None:
    spec = overlay["ScaledObject"]["spec"]
    (trigger,) = spec["triggers"]
    assert spec["scaleTargetRef"]["name"] == overlay["Deployment"]["metadata"]["name"]
    assert spec["minReplicaCount"] == 0
    assert trigger["metadata"]["queueURLFromEnv"] in overlay["ConfigMap"]["data"]
    region = trigger["metadata"]["awsRegion"]
    assert f"//sqs.{region}." in overlay["ConfigMap"]["data"]["CVWORKER_QUEUE_URL"]
    assert trigger["metadata"]["activationQueueLength"] == "0"
    assert trigger["authenticationRef"]["name"] == overlay["TriggerAuthentication"]["metadata"]["name"]
    assert "replicas" not in overlay["Deployment"]["spec"]


def test_kubernetes_and_ecs_scale_alike(overlay: dict[str, Object]) -> None:
    parameters = read_template("service.yaml")["Parameters"]
    spec = overlay["ScaledObject"]["spec"]
    assert spec["triggers"][0]["metadata"]["queueLength"] == str(parameters["BacklogPerTask"]["Default"])
    assert spec["triggers"][0]["metadata"]["scaleOnInFlight"] == "true"
    assert spec["maxReplicaCount"] == parameters["MaxTasks"]["Default"]
    assert spec["minReplicaCount"] == parameters["MinTasks"]["Default"]


def test_a_node_with_a_single_worker_can_be_drained(overlay: dict[str, Object]) -> None:
    assert overlay["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    assert "minAvailable" not in overlay["PodDisruptionBudget"]["spec"]


# ---- the network


def lets_out(policies: list[Object], address: str, port: int) -> bool:
    ip = ipaddress.ip_address(address)
    for rule in (rule for policy in policies for rule in policy["spec"]["egress"]):
        if port not in [each["port"] for each in rule["ports"]]:
            continue
        for block in (each["ipBlock"] for each in rule["to"] if "ipBlock" in each):
            excluded = any(ip in ipaddress.ip_network(network) for network in block.get("except", []))
            if ip in ipaddress.ip_network(block["cidr"]) and not excluded:
                return True
    return False


POLICIES = [objects("gpu")[name] for name in ("NetworkPolicy", "cvworker-private")]


@pytest.mark.parametrize("address", METADATA_SERVICES)
def test_no_metadata_service_can_be_asked(address: str) -> None:
    assert not any(lets_out(POLICIES, address, port) for port in (80, 443, 32526))


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str))
@example("10.1.2.3")
@example("172.31.0.1")
@example("192.168.1.1")
@example("100.64.0.1")
@example("fd12::1")
@example("93.184.215.14")
@example("2606:2800:21f:cb07:6820:80da:af6b:8b2c")
def test_pods_may_call_the_addresses_that_the_worker_would_and_no_others(address: str) -> None:
    ip = ipaddress.ip_address(address)
    assume(ip not in ipaddress.ip_network("64:ff9b::/96"))  # NAT64, which few clusters have
    address = str(getattr(ip, "ipv4_mapped", None) or address)  # as it is dialled
    if refusal(address) is None:
        assert lets_out(POLICIES, address, 443), address
    elif lets_out(POLICIES, address, 443):
        # What is left is public by number, and refused by the worker for what it embeds.
        assert ipaddress.ip_address(address).is_global, address


@pytest.mark.parametrize("port", [22, 25, 3306, 6379, 8080])
def test_only_the_webs_ports_are_open(port: int) -> None:
    assert not lets_out(POLICIES, "93.184.215.14", port)


def test_the_ports_are_the_ones_that_the_worker_dials(overlay: dict[str, Object]) -> None:
    ports = overlay["ConfigMap"]["data"]["CVWORKER_ALLOWED_PORTS"].split(",")
    assert all(lets_out(POLICIES, "93.184.215.14", int(port)) for port in ports)


def test_a_private_range_that_is_named_is_let_out(tmp_path: Path) -> None:
    # given the overlay's own example, without its comment signs
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    path = tmp_path / "kubernetes" / "overlays" / "gpu" / "kustomization.yaml"
    text = path.read_text()
    at = text.index("  # - target: {kind: NetworkPolicy")
    path.write_text(text[:at] + re.sub(r"^  # ", "  ", text[at:], flags=re.MULTILINE))
    # when
    built = [each for each in build(path.parent) if each["kind"] == "NetworkPolicy"]
    # then
    assert lets_out(built, "10.0.128.7", 443)
    assert not lets_out(built, "10.0.128.7", 80)
    assert not lets_out(built, "10.1.0.1", 443)


def test_nobody_but_prometheus_may_call_in(overlay: dict[str, Object]) -> None:
    (rule,) = overlay["NetworkPolicy"]["spec"]["ingress"]
    assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert rule["ports"] == [{"protocol": "TCP", "port": container(overlay)["ports"][0]["containerPort"]}]
