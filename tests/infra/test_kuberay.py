"""The Kubernetes manifests: each kind by its strict schema, whatever they refer to is there, the ledger's URL is for
the head alone. No cluster is needed; every check stands beside a manifest that is broken on purpose."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess

import pytest
import yaml
from manifests import INFRA, KUBERAY, at, documents, faults, keys, misspelt

FILES = {file.relative_to(KUBERAY).as_posix(): file for file in sorted(KUBERAY.rglob("*.yaml"))}
KUSTOMIZATIONS = {name: file for name, file in FILES.items() if file.name == "kustomization.yaml"}
UNKNOWN = {"PodMonitor"}  # the Prometheus operator's: no schema of it is at hand
OBJECTS = {
    f"{name}: {document['kind']}": document
    for name, file in FILES.items()
    if name not in KUSTOMIZATIONS
    for document in documents(file)
}
NAMESPACES = {file.parent.name: documents(file)[0].get("namespace") for file in KUSTOMIZATIONS.values()}
for _name, _document in OBJECTS.items():  # as kustomize, or `kubectl -n purser`, does
    _document["metadata"]["namespace"] = NAMESPACES.get(_name.partition("/")[0], "purser")
SPACE, LEDGER = "kubernetes.io/metadata.name", "purser-ledger"
POD, WORKERS = ("template", "spec"), ("spec", "workerGroupSpecs")
ANYTHING = {("apiVersion",), ("kind",), ("spec", "metadata", "account")}  # without the former it is no such object
BY_SCHEMA = [name for name, document in OBJECTS.items() if document["kind"] not in UNKNOWN]


def one(kind: str, name: str = "") -> dict:
    """The object of that kind."""
    (found,) = [d for d in OBJECTS.values() if d["kind"] == kind and name in d["metadata"]["name"]]
    return copy.deepcopy(found)


def identity(document: dict) -> str:
    """NAMESPACE/NAME."""
    return f"{document['metadata']['namespace']}/{document['metadata']['name']}"


def pods(document: dict) -> dict[str, dict]:
    """The pod templates of an object, by what they are for, with the labels that KubeRay adds."""
    spec = document.get("spec", {})
    if document["kind"] != "RayCluster":
        return {document["metadata"]["name"]: spec["template"]} if "template" in spec else {}
    groups = {"head": spec["headGroupSpec"], **{group["groupName"]: group for group in spec["workerGroupSpecs"]}}
    made = {}
    for name, group in groups.items():
        added = {
            "ray.io/cluster": document["metadata"]["name"],
            "ray.io/node-type": "head" if name == "head" else "worker",
            "ray.io/is-ray-node": "yes",
        }
        made[name] = {**group["template"], "metadata": {"labels": added}}
    return made


def all_pods(objects: list[dict]) -> dict[str, dict]:
    """The pod templates of all objects."""
    return {name: pod for document in objects for name, pod in pods(document).items()}


# Schemas


@pytest.mark.parametrize("name", BY_SCHEMA)
def test_an_object_is_what_its_kind_may_be(name):
    assert faults(OBJECTS[name]) == []


@pytest.mark.parametrize("name", BY_SCHEMA)
def test_each_key_that_is_misspelt_is_found(name):
    document = OBJECTS[name]
    paths = [path for path in keys(document) if path not in ANYTHING]
    assert len(paths) > 5
    unseen = [path for path in paths if f"'{path[-1]}x'" not in " ".join(faults(misspelt(document, path)))]
    assert unseen == []


@pytest.mark.parametrize(
    ("kind", "path", "wrong"),
    [
        ("RayCluster", ("spec", "authOptions", "mode"), "tokens"),
        ("RayCluster", ("spec", "networkPolicy", "mode"), "DenyIngress"),
        ("RayCluster", ("spec", "autoscalerOptions", "version"), 2),
        ("RayCluster", ("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        ("RayJob", ("spec", "backoffLimit"), "0"),
        ("StatefulSet", ("spec", "replicas"), "1"),
        ("NetworkPolicy", ("spec", "policyTypes"), "Ingress"),
    ],
)
def test_a_value_of_the_wrong_kind_is_found(kind, path, wrong):
    document = one(kind)
    assert faults(document) == []
    at(document, path[:-1])[path[-1]] = wrong
    assert faults(document) != []


# References


def made_by_hand() -> dict[str, set[str]]:
    """The secrets that the README has commands for, as NAMESPACE/NAME, with their keys."""
    text = re.sub(r"\\\n\s*", " ", (INFRA / "README.md").read_text())
    commands = re.findall(r"kubectl -n (\S+) create secret generic (\S+)(.*)", text)
    return {f"{space}/{name}": set(re.findall(r"--from-literal=(\w+)=", rest)) for space, name, rest in commands}


def wanted(objects: list[dict]) -> list[tuple[str, str, str]]:
    """What pods refer to: (kind, NAMESPACE/NAME, key)."""
    found = []
    for document in objects:
        space = document["metadata"]["namespace"]
        for pod in pods(document).values():
            for volume in pod["spec"].get("volumes", []):
                if secret := volume.get("secret"):
                    found += [("secret", f"{space}/{secret['secretName']}", item["key"]) for item in secret["items"]]
                if config := volume.get("configMap"):
                    found.append(("configMap", f"{space}/{config['name']}", ""))
                if claim := volume.get("persistentVolumeClaim"):
                    found.append(("claim", f"{space}/{claim['claimName']}", ""))
            for container in pod["spec"]["containers"]:
                for variable in container.get("env", []):
                    if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                        found.append(("secret", f"{space}/{reference['name']}", reference["key"]))
        if document["kind"] == "RayCluster":  # the key is KubeRay's
            found.append(("secret", f"{space}/{document['spec']['authOptions']['secretName']}", "auth_token"))
    return found


def dangling(objects: list[dict]) -> list[str]:
    """Whatever is referred to and not there: secrets, config maps, claims, volumes."""
    secrets = made_by_hand()
    claims = {identity(d) for d in objects if d["kind"] == "PersistentVolumeClaim"}
    generated = {
        f"{NAMESPACES[file.parent.name]}/{made['name']}"
        for file in KUSTOMIZATIONS.values()
        for made in documents(file)[0].get("configMapGenerator", [])
    }
    there = {"claim": claims, "configMap": generated, "secret": set(secrets)}
    found = [
        f"{kind} {name} {key}".strip()
        for kind, name, key in wanted(objects)
        if name not in there[kind] or (kind == "secret" and key not in secrets[name])
    ]
    for document in objects:
        own = {claim["metadata"]["name"] for claim in document.get("spec", {}).get("volumeClaimTemplates", [])}
        for name, pod in pods(document).items():
            volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])} | own
            mounts = [mount["name"] for c in pod["spec"]["containers"] for mount in c.get("volumeMounts", [])]
            found += [f"volume {mount} of {name}" for mount in mounts if mount not in volumes]
    return found


def test_whatever_is_referred_to_is_made():
    assert dangling(list(OBJECTS.values())) == []


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("RayCluster", ("spec", "authOptions", "secretName")),
        ("RayCluster", ("spec", "headGroupSpec", *POD, "volumes", 1, "secret", "items", 0, "key")),
        ("RayCluster", (*WORKERS, 0, *POD, "volumes", 0, "persistentVolumeClaim", "claimName")),
        ("RayCluster", (*WORKERS, 1, *POD, "containers", 0, "volumeMounts", 0, "name")),
        ("StatefulSet", ("spec", "volumeClaimTemplates", 0, "metadata", "name")),
        ("StatefulSet", ("spec", *POD, "volumes", 0, "configMap", "name")),
        ("Job", ("spec", *POD, "containers", 0, "env", 0, "valueFrom", "secretKeyRef", "name")),
    ],
)
def test_what_is_not_made_is_found(kind, path):
    objects = copy.deepcopy(list(OBJECTS.values()))
    (document,) = [d for d in objects if d["kind"] == kind]
    at(document, path[:-1])[path[-1]] = "nobody"
    assert dangling(objects) != []


def test_secrets_that_are_made_are_used():
    used = {(name, key) for kind, name, key in wanted(list(OBJECTS.values())) if kind == "secret"}
    assert used == {(name, key) for name, of in made_by_hand().items() for key in of}


def selected(selector: dict, objects: list[dict], space: str) -> set[str]:
    """The pods of a namespace that a selector means."""
    there = [document for document in objects if document["metadata"]["namespace"] == space]
    return {
        name
        for name, pod in all_pods(there).items()
        if selector.items() <= pod.get("metadata", {}).get("labels", {}).items()
    }


def test_selectors_mean_the_pods_they_are_for():
    objects = list(OBJECTS.values())
    assert selected(one("Service")["spec"]["selector"], objects, LEDGER) == {"purser-ledger"}
    assert selected(one("StatefulSet")["spec"]["selector"]["matchLabels"], objects, LEDGER) == {"purser-ledger"}
    assert selected(one("PodMonitor")["spec"]["selector"]["matchLabels"], objects, "purser") == {"head", "cpu", "gpu"}
    assert one("PodMonitor")["metadata"]["namespace"] == one("RayCluster")["metadata"]["namespace"] == "purser"
    assert one("RayJob")["spec"]["clusterSelector"]["ray.io/cluster"] == one("RayCluster")["metadata"]["name"]
    assert one("StatefulSet")["spec"]["serviceName"] == one("Service")["metadata"]["name"]


def test_metrics_are_scraped_where_they_are_and_let_through():
    (endpoint,) = one("PodMonitor")["spec"]["podMetricsEndpoints"]
    cluster = one("RayCluster")
    for name, pod in pods(cluster).items():
        (port,) = [p for p in pod["spec"]["containers"][0]["ports"] if p["name"] == endpoint["port"]]
        rules = cluster["spec"]["networkPolicy"]["head" if name == "head" else "worker"]["ingressRules"]
        assert port["containerPort"] in [open_["port"] for rule in rules for open_ in rule["ports"]]


# The ledger


def reach_the_ledger(policy: dict, objects: list[dict]) -> set[str]:
    """The pods that the policy lets in."""
    found: set[str] = set()
    for peer in [peer for rule in policy["spec"]["ingress"] for peer in rule["from"]]:
        spaces = peer.get("namespaceSelector", {"matchLabels": {SPACE: policy["metadata"]["namespace"]}})["matchLabels"]
        assert set(spaces) == {SPACE}  # one namespace, by its name
        found |= selected(peer["podSelector"]["matchLabels"], objects, spaces[SPACE])
    return found


def test_only_the_head_and_the_job_that_makes_it_reach_the_ledger():
    objects, policy = list(OBJECTS.values()), one("NetworkPolicy")
    assert selected(policy["spec"]["podSelector"]["matchLabels"], objects, LEDGER) == {"purser-ledger"}
    assert "Ingress" in policy["spec"]["policyTypes"]
    assert reach_the_ledger(policy, objects) == {"head", "purser-ledger-init"}
    del policy["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]["ray.io/node-type"]
    assert reach_the_ledger(policy, objects) == {"head", "cpu", "gpu", "purser-ledger-init"}


def holders(objects: list[dict]) -> dict[str, set[str]]:
    """Who is given a ledger's URL, and by which secret; and whose processes inherit it as a variable."""
    found: dict[str, set[str]] = {}
    for name, pod in all_pods(objects).items():
        for volume in pod["spec"].get("volumes", []):
            secret = volume.get("secret", {})
            if "url" in [item["key"] for item in secret.get("items", [])]:
                found.setdefault(name, set()).add(f"file {secret['secretName']}")
        for container in pod["spec"]["containers"]:
            for variable in container.get("env", []):
                if variable["name"] == "PURSER_LEDGER":
                    found.setdefault(name, set()).add(f"variable {variable['valueFrom']['secretKeyRef']['name']}")
    return found


def test_the_ledgers_url_is_the_heads_alone_and_no_variable_of_it():
    objects = copy.deepcopy(list(OBJECTS.values()))
    right = {"head": {"file purser-ledger"}, "purser-ledger-init": {"variable purser-ledger-owner"}}
    assert holders(objects) == right
    (cluster,) = [d for d in objects if d["kind"] == "RayCluster"]
    given = {"name": "PURSER_LEDGER", "valueFrom": {"secretKeyRef": {"name": "purser-ledger", "key": "url"}}}
    cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["env"].append(given)
    assert holders(objects) != right  # workers share one list: an alias in the file


def test_the_owners_password_is_in_another_namespace_than_the_cluster():
    owners = {name for _, name, _ in wanted(list(OBJECTS.values())) if "owner" in name}
    assert owners == {"purser-ledger/purser-ledger-owner"}
    urls = re.findall(r"postgresql://(\w+):\S+@(\S+)/(\w+)", (INFRA / "README.md").read_text())
    environment = {
        v["name"]: v["value"] for v in one("StatefulSet")["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    assert {(role, books) for role, _, books in urls} == {
        (environment["POSTGRES_USER"], environment["POSTGRES_DB"]),
        ("purser_service", environment["POSTGRES_DB"]),
    }
    assert f"host={one('Service')['metadata']['name']}.{LEDGER}" in (INFRA / "README.md").read_text()


# The cluster


def unsafe(objects: list[dict]) -> list[str]:
    """Whatever would run without the token, as root, beside the ledger, on a folder of its own, or more than once."""
    (cluster,) = [d for d in objects if d["kind"] == "RayCluster"]
    (job,) = [d["spec"] for d in objects if d["kind"] == "RayJob"]
    claims = {d["metadata"]["name"]: d["spec"]["accessModes"] for d in objects if d["kind"] == "PersistentVolumeClaim"}
    found = [] if cluster["spec"]["authOptions"]["mode"] == "token" else ["the cluster wants no token"]
    for name, pod in pods(cluster).items():
        (container,) = pod["spec"]["containers"]
        environment = {variable["name"]: variable.get("value") for variable in container["env"]}
        if environment.get("RAY_AUTH_MODE") != "token":
            found.append(f"{name}: Ray wants no token")
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume.get("persistentVolumeClaim") for volume in pod["spec"]["volumes"]}
        claim = volumes.get(mounted.get(environment.get("PURSER_HOME", ""), "")) or {}
        if claims.get(claim.get("claimName")) != ["ReadWriteMany"]:
            found.append(f"{name}: PURSER_HOME is on no shared volume")
    bounded = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for name, pod in all_pods(objects).items():
        who = pod["spec"]["securityContext"]
        boxes = [container["securityContext"] for container in pod["spec"]["containers"]]
        if not (who["runAsNonRoot"] and who["runAsUser"]) or any(box != bounded for box in boxes):
            found.append(f"{name}: more rights than it needs")
    if cluster["spec"]["autoscalerOptions"]["securityContext"] != bounded:
        found.append("the autoscaler: more rights than it needs")
    if cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] != "0" or not job["entrypointNumCpus"]:
        found.append("work lands on the head")
    if job["backoffLimit"] or job["shutdownAfterJobFinishes"]:
        found.append("a job is charged again, or ends the cluster")
    return found


def test_nothing_runs_in_a_way_that_it_must_not():
    assert unsafe(list(OBJECTS.values())) == []


@pytest.mark.parametrize(
    ("kind", "path", "wrong"),
    [
        ("RayCluster", ("spec", "authOptions", "mode"), "disabled"),
        ("RayCluster", (*WORKERS, 1, *POD, "containers", 0, "env", 0, "value"), "disabled"),
        ("RayCluster", (*WORKERS, 0, *POD, "containers", 0, "env", 2, "value"), "/home/ray"),
        ("RayCluster", ("spec", "headGroupSpec", *POD, "securityContext", "runAsUser"), 0),
        ("RayCluster", ("spec", "headGroupSpec", *POD, "containers", 0, "securityContext"), {"privileged": True}),
        ("RayCluster", ("spec", "autoscalerOptions", "securityContext"), {}),
        ("RayCluster", ("spec", "headGroupSpec", "rayStartParams", "num-cpus"), "4"),
        ("StatefulSet", ("spec", *POD, "securityContext", "runAsNonRoot"), False),
        ("PersistentVolumeClaim", ("spec", "accessModes"), ["ReadWriteOnce"]),
        ("RayJob", ("spec", "entrypointNumCpus"), 0),
        ("RayJob", ("spec", "backoffLimit"), 1),
        ("RayJob", ("spec", "shutdownAfterJobFinishes"), True),
    ],
)
def test_what_runs_in_such_a_way_is_found(kind, path, wrong):
    objects = copy.deepcopy(list(OBJECTS.values()))
    (document,) = [d for d in objects if d["kind"] == kind]
    at(document, path[:-1])[path[-1]] = wrong
    assert unsafe(objects) != []


# Kustomize


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_a_kustomization_names_what_is_there(name):
    folder = KUSTOMIZATIONS[name].parent
    (document,) = documents(KUSTOMIZATIONS[name])
    files = [file for made in document.get("configMapGenerator", []) for file in made["files"]]
    named = document.get("resources", []) + document.get("components", []) + files
    assert [entry for entry in named if not (folder / entry).exists()] == []


def test_every_object_belongs_to_a_kustomization_or_is_applied_by_hand():
    named = {
        (file.parent / entry).resolve()
        for file in KUSTOMIZATIONS.values()
        for entry in documents(file)[0].get("resources", [])
    }
    loose = {name for name, file in FILES.items() if name not in KUSTOMIZATIONS and file.resolve() not in named}
    assert loose == {"monitoring/podmonitor.yaml"}
    assert "infra/kuberay/monitoring/podmonitor.yaml" in (INFRA / "README.md").read_text()


def kustomize(folder: object) -> list[dict]:
    """What would be applied."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed; with it the kustomizations are built")
    ended = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return list(yaml.safe_load_all(ended.stdout))


def test_what_is_applied_is_valid_in_its_namespace_and_has_one_image():
    built = [d for part in (".", "setup", "job") for d in kustomize(KUBERAY / part)]
    assert {d["kind"] for d in built} == {d["kind"] for d in OBJECTS.values()} - UNKNOWN | {"ConfigMap"}
    assert [fault for document in built for fault in faults(document)] == []
    assert {identity(document) for document in built if document["kind"] != "ConfigMap"} == {
        identity(document) for document in OBJECTS.values() if document["kind"] not in UNKNOWN
    }
    images = {container["image"] for pod in all_pods(built).values() for container in pod["spec"]["containers"]}
    assert images == {"purser:0.1.0", "postgres:17"}
    (roles,) = [d for d in built if d["kind"] == "ConfigMap"]
    assert roles["data"]["roles.sh"] == (KUBERAY / "ledger" / "roles.sh").read_text()


def test_a_misspelt_key_of_a_kustomization_is_found(tmp_path):
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    assert kustomize(tmp_path / "kuberay" / "job")
    file = tmp_path / "kuberay" / "job" / "kustomization.yaml"
    file.write_text(file.read_text().replace("components:", "component:"))
    with pytest.raises(AssertionError, match="component"):
        kustomize(tmp_path / "kuberay" / "job")
