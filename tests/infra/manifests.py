"""What tests of the manifests share: reading them, their schemas made strict, and keys misspelt on purpose.

KubeRay's and Compose's schemas lie beside the repository; Kubernetes' own come with a package. A misspelt key is a
setting that is silently absent, so schemas are made to refuse what they do not name.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import referencing
import yaml
from product import REPOSITORY

INFRA = REPOSITORY / "infra"
KUBERAY = INFRA / "kuberay"
SCHEMAS = REPOSITORY.parent / "shared" / "schemas"
KUBERNETES = "v1.34.0-local-strict"
CUSTOM = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}

# Maps whose keys are names of somebody's choice.
FREE = {"labels", "matchLabels", "annotations", "rayStartParams", "limits", "requests", "clusterSelector", "selector"}


def documents(file: Path) -> list[Any]:
    """The YAML documents of `file`."""
    return list(yaml.safe_load_all(file.read_text()))


def shared(name: str) -> Path:
    """A schema that lies beside the repository; skips where it does not."""
    file = SCHEMAS / name
    if not file.exists():
        pytest.skip(f"{name} is not in ../shared/schemas, so that nothing can be checked against it")
    return file


def closed(schema: Any) -> Any:
    """`schema`, refusing keys that it does not name, but where it says that it keeps unknown ones."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


@functools.cache
def _kubernetes(name: str) -> Any:
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / KUBERNETES
    return json.loads((folder / name).read_text())


@functools.cache
def validator(kind: str, version: str) -> jsonschema.protocols.Validator:
    """The strict validator of one kind of Kubernetes' objects, or of KubeRay's."""
    if kind in CUSTOM:
        definition = yaml.load(shared(CUSTOM[kind]).read_text(), yaml.CSafeLoader)
        (served,) = [each for each in definition["spec"]["versions"] if f"ray.io/{each['name']}" == version]
        return jsonschema.Draft202012Validator(closed(served["schema"]["openAPIV3Schema"]))
    group, _, last = version.rpartition("/")
    name = "-".join([kind.lower(), *([group.partition(".")[0]] if group else []), last])
    known = [referencing.Resource.from_contents(_kubernetes(file)) for file in (f"{name}.json", "_definitions.json")]
    return jsonschema.Draft202012Validator(known[0].contents, registry=known @ referencing.Registry())


def faults(document: dict[str, Any]) -> list[str]:
    """What is wrong with a Kubernetes object, by its schema."""
    found = [error.message for error in validator(document["kind"], document["apiVersion"]).iter_errors(document)]
    if document["kind"] in CUSTOM:  # a custom resource's schema says nothing of its metadata
        rest = {key: value for key, value in document.items() if key != "spec"}
        bearer = {**rest, "apiVersion": "v1", "kind": "ConfigMap"}
        found += [error.message for error in validator("ConfigMap", "v1").iter_errors(bearer)]
    return found


def at(document: Any, path: tuple[Any, ...]) -> Any:
    """What lies in `document` at `path`."""
    return functools.reduce(lambda part, key: part[key], path, document)


def keys(part: Any, path: tuple[Any, ...] = (), free: frozenset[str] | set[str] = FREE) -> Iterator[tuple[Any, ...]]:
    """The path of every key in `part` that a schema must know."""
    if isinstance(part, dict):
        for key, value in part.items():
            if not path or path[-1] not in free:
                yield (*path, key)
            yield from keys(value, (*path, key), free)
    elif isinstance(part, list):
        for index, value in enumerate(part):
            yield from keys(value, (*path, index), free)


def misspelt(document: Any, path: tuple[Any, ...]) -> Any:
    """`document` with a letter too many in the key at `path`."""
    wrong = copy.deepcopy(document)
    parent = at(wrong, path[:-1])
    parent[f"{path[-1]}x"] = parent.pop(path[-1])
    return wrong
