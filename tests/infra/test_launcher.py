"""The file for `ray up`: by Ray's own schema and checks; token on, dashboard on loopback, no URL of a ledger in it."""

from __future__ import annotations

import copy
import json
from importlib import resources

import jsonschema
import pytest
from manifests import FREE, INFRA, at, documents, keys, misspelt

FILE = INFRA / "launcher" / "cluster.yaml"
(CLUSTER,) = documents(FILE)
NAMED = FREE | {"available_node_types", "node_config", "MetadataOptions", "resources", "file_mounts", "provider"}
SCHEMA = json.loads((resources.files("ray.autoscaler") / "ray-schema.json").read_text())


@pytest.fixture
def cluster() -> dict:
    return copy.deepcopy(CLUSTER)


def faults(document: dict) -> list[str]:
    """What is wrong by Ray's schema."""
    return [error.message for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(document)]


def test_it_is_what_the_launcher_reads():
    from ray.autoscaler._private.util import prepare_config, validate_config

    assert faults(CLUSTER) == []
    validate_config(prepare_config(copy.deepcopy(CLUSTER)))  # also that types are there and numbers add up


def test_each_key_that_is_misspelt_is_found():
    paths = list(keys(CLUSTER, free=NAMED))
    assert len(paths) > 20
    assert [path for path in paths if not faults(misspelt(CLUSTER, path))] == []


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("max_workers",), "8"),
        (("docker", "run_options"), "-e RAY_AUTH_MODE=token"),
        (("available_node_types", "gpu", "min_workers"), "0"),
        (("head_start_ray_commands",), "ray start --head"),
        (("provider", "type"), 7),
    ],
)
def test_a_value_of_the_wrong_kind_is_found(cluster, path, wrong):
    at(cluster, path[:-1])[path[-1]] = wrong
    assert faults(cluster) != []


def unsafe(document: dict) -> list[str]:
    """Whatever would start Ray open to others, or hand out the ledger."""
    found = []
    if "-e RAY_AUTH_MODE=token" not in document["docker"]["run_options"]:
        found.append("no token")
    starts = [command for command in document["head_start_ray_commands"] if command.startswith("ray start")]
    if not all("--dashboard-host=127.0.0.1" in command.split() for command in starts):
        found.append("the dashboard is not on loopback")
    if "PURSER_LEDGER" in json.dumps(document) or "postgresql:" in json.dumps(document):
        found.append("what is written here goes to every node")
    if document["available_node_types"]["head"]["resources"] != {"CPU": 0}:
        found.append("work lands on the head")
    groups = {name: set(of["node_config"]["SecurityGroupIds"]) for name, of in document["available_node_types"].items()}
    head = groups.pop("head")
    if any(head & others for others in groups.values()):
        found.append("workers are in the head's security group, which the ledger lets in")
    return found


def test_it_starts_nothing_open_and_keeps_the_ledger_to_the_head():
    assert unsafe(CLUSTER) == []


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("docker", "run_options", 1), "-e RAY_AUTH_MODES=token"),
        (("head_start_ray_commands", 1), "ray start --head --dashboard-host=0.0.0.0"),
        (("docker", "run_options", 2), "-e PURSER_LEDGER=postgresql://db/books"),
        (("available_node_types", "head", "resources"), {}),
        (("available_node_types", "cpu", "node_config", "SecurityGroupIds"), ["sg-0123456789abcdef0"]),
    ],
)
def test_what_is_unsafe_is_found(cluster, path, wrong):
    at(cluster, path[:-1])[path[-1]] = wrong
    assert unsafe(cluster) != []


def test_purser_home_is_mounted_on_every_node():
    (home,) = [option for option in CLUSTER["docker"]["run_options"] if "PURSER_HOME=" in option]
    (mount,) = [option for option in CLUSTER["docker"]["run_options"] if option.startswith("-v ")]
    outside, inside = mount.removeprefix("-v ").split(":")
    assert home.partition("=")[2] == inside
    (shared,) = [command for command in CLUSTER["initialization_commands"] if "mount -t efs -o tls" in command]
    assert outside in shared.split()
