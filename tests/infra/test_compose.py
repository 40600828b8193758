"""The Compose file: valid, nothing secret in it, nothing listens beyond this machine, the ledger's URL is for the head
alone. Docker is not needed; every check stands beside a file that is broken on purpose."""

from __future__ import annotations

import copy
import json
import re
import shutil
import stat
import subprocess

import jsonschema
import pytest
from manifests import FREE, INFRA, at, documents, keys, misspelt, shared

from cluster.accounting import databases

FILE = INFRA / "compose" / "compose.yaml"
(COMPOSE,) = documents(FILE)
# Maps whose keys are names of somebody's choice.
NAMED = FREE | {"services", "depends_on", "networks", "volumes", "secrets", "environment", "args"}
RAY = {"head", "worker"}


@pytest.fixture
def compose() -> dict:
    return copy.deepcopy(COMPOSE)


def faults(document: dict) -> list[str]:
    """What is wrong by the Compose specification."""
    checker = jsonschema.Draft202012Validator(json.loads(shared("compose-spec.json").read_text()))
    return [part.message for error in checker.iter_errors(document) for part in (error, *(error.context or []))]


def test_it_is_what_compose_reads():
    assert faults(COMPOSE) == []
    assert re.findall(r"(?<!\$)\$(?!\$)", FILE.read_text()) == []  # Compose would put a variable of its own there


def test_each_key_that_is_misspelt_is_found():
    paths = [path for path in keys(COMPOSE, free=NAMED) if not str(path[0]).startswith("x-")]
    assert len(paths) > 80
    assert [path for path in paths if not faults(misspelt(COMPOSE, path))] == []


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("services", "ledger", "restart"), True),
        (("services", "ledger", "healthcheck", "retries"), [12]),
        (("services", "worker", "deploy", "replicas"), [2]),
        (("services", "head", "depends_on", "ledger", "condition"), "healthy"),
        (("secrets", "ray-token", "file"), 7),
    ],
)
def test_a_value_of_the_wrong_kind_is_found(compose, path, wrong):
    at(compose, path[:-1])[path[-1]] = wrong
    assert faults(compose) != []


# References


def sources(service: dict) -> dict[str, str]:
    """What is mounted, by where: named volumes and paths of this machine."""
    return {mount.split(":")[1]: mount.split(":")[0] for mount in service.get("volumes", [])}


def dangling(document: dict) -> list[str]:
    """Whatever a service refers to and is not there."""
    found = []
    for name, service in document["services"].items():
        for field, there in (("secrets", "secrets"), ("networks", "networks"), ("depends_on", "services")):
            found += [f"{name}: {field} {other}" for other in service.get(field, []) if other not in document[there]]
        for source in sources(service).values():
            there = (FILE.parent / source).exists() if source.startswith(".") else source in document["volumes"]
            found += [] if there else [f"{name}: {source}"]
        for variable, value in service.get("environment", {}).items():
            if str(value).startswith("/run/secrets/"):
                held = value.removeprefix("/run/secrets/") in (*service.get("secrets", []), "ray-token")
                found += [] if held else [f"{name}: {variable} is a secret that it has not"]
    return found


def test_whatever_is_referred_to_is_there():
    assert dangling(COMPOSE) == []


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("services", "head", "secrets", 0), "token"),
        (("services", "worker", "networks", 0), "rays"),
        (("services", "ledger", "volumes", 0), "books:/var/lib/postgresql/data"),
        (("services", "prometheus", "volumes", 0), "../prometheus/prom.yml:/etc/prometheus/prometheus.yml:ro"),
        (("services", "grafana", "secrets"), []),
        (("services", "worker", "depends_on"), {"leader": {"condition": "service_healthy"}}),
    ],
)
def test_what_is_not_there_is_found(compose, path, wrong):
    at(compose, path[:-1])[path[-1]] = wrong
    assert dangling(compose) != []


def test_grafana_finds_prometheus_and_the_dashboards_where_they_are():
    (source,) = documents(INFRA / "grafana" / "provisioning" / "datasources" / "prometheus.yml")[0]["datasources"]
    head = COMPOSE["services"]["head"]["environment"]
    assert source["url"] == head["RAY_PROMETHEUS_HOST"] == "http://prometheus:9090"
    assert head["RAY_GRAFANA_HOST"] == "http://grafana:3000"
    providers = documents(INFRA / "grafana" / "provisioning" / "dashboards" / "dashboards.yml")[0]["providers"]
    mounted = sources(COMPOSE["services"]["grafana"])
    found = {mounted[provider["options"]["path"]] for provider in providers}
    assert found == {"../grafana/dashboards", "ray-dashboards"}
    assert sources(COMPOSE["services"]["head"])[head["RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"]] == "ray-dashboards"


def test_prometheus_scrapes_the_port_of_every_node():
    (job,) = documents(INFRA / "prometheus" / "prometheus.yml")[0]["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert set(found["names"]) == RAY
    for name in RAY:
        service = COMPOSE["services"][name]
        assert f"--metrics-export-port={found['port']}" in " ".join(service["command"]).split()
        assert set(COMPOSE["services"]["prometheus"]["networks"]) & set(service["networks"])


def test_prometheus_reads_its_configuration(tmp_path):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed; `apt-get install prometheus` makes this run")
    for name in ("prometheus.yml", "rules.yml"):
        shutil.copy(INFRA / "prometheus" / name, tmp_path)
    check = ["promtool", "check", "config", tmp_path / "prometheus.yml"]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0
    wrong = (tmp_path / "prometheus.yml").read_text().replace("dns_sd_configs", "dns_sd_config")
    (tmp_path / "prometheus.yml").write_text(wrong)
    assert subprocess.run(check, capture_output=True, check=False).returncode != 0


# What must not leak


def exposed(document: dict) -> list[str]:
    """Ports that others than this machine could reach."""
    return [
        f"{name}: {port}"
        for name, service in document["services"].items()
        for port in service.get("ports", [])
        if not str(port).startswith("127.0.0.1:")
    ]


def literal(document: dict) -> list[str]:
    """Passwords and tokens that are written into the file instead of pointed at."""
    secret = re.compile(r".*(PASSWORD|TOKEN|SECRET).*(?<!_FILE)(?<!_PATH)")
    return [
        f"{name}: {variable}"
        for name, service in document["services"].items()
        for variable in service.get("environment", {})
        if secret.fullmatch(variable)
    ]


def near_the_ledger(document: dict) -> set[str]:
    """The services that share a network with the ledger."""
    networks = set(document["services"]["ledger"]["networks"])
    return {name for name, service in document["services"].items() if networks & set(service["networks"])}


def test_ports_are_on_loopback(compose):
    assert exposed(compose) == []
    for wrong in ("8265:8265", "0.0.0.0:8265:8265"):
        compose["services"]["head"]["ports"] = [wrong]
        assert exposed(compose) == [f"head: {wrong}"]


def test_no_password_is_in_the_file(compose):
    assert literal(compose) == []
    compose["services"]["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"] = "admin"
    assert literal(compose) == ["grafana: GF_SECURITY_ADMIN_PASSWORD"]


def test_only_the_head_and_the_service_that_makes_it_reach_the_ledger(compose):
    assert near_the_ledger(compose) == {"ledger", "init", "head"}
    assert compose["networks"]["books"] == {"internal": True}
    compose["services"]["worker"]["networks"].append("books")
    assert "worker" in near_the_ledger(compose)


def unsafe(document: dict) -> list[str]:
    """Secrets in wrong hands, Ray without its token or with rights it does not need, a ledger that is made unasked."""
    services, found = document["services"], []
    right = {"service-url": {"head"}, "owner-url": {"init"}, "ray-token": RAY, "owner-password": {"ledger"}}
    for secret, holders in right.items():
        if {name for name, service in services.items() if secret in service.get("secrets", [])} != holders:
            found.append(f"{secret} is held by others")
    for name, service in services.items():
        if "PURSER_LEDGER" in service.get("environment", {}):
            found.append(f"{name}: whatever runs there inherits the ledger's URL")
        if "init" in service.get("depends_on", {}):
            found.append(f"{name}: the ledger is made unasked")
    for name in (*RAY, "init"):
        if services[name]["environment"].get("RAY_AUTH_MODE") != "token":
            found.append(f"{name}: Ray wants no token")
        rights = services[name].get("cap_drop"), services[name].get("security_opt"), services[name].get("user")
        if rights != (["ALL"], ["no-new-privileges:true"], None):  # the user is the image's
            found.append(f"{name}: more rights than it needs")
    if (services["init"].get("profiles"), services["init"]["restart"]) != (["setup"], "no"):
        found.append("the ledger is made unasked")
    return found


def test_nothing_runs_in_a_way_that_it_must_not():
    assert unsafe(COMPOSE) == []


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("services", "worker", "secrets"), ["ray-token", "service-url"]),
        (("services", "prometheus", "secrets"), ["ray-token"]),
        (("services", "head", "environment", "PURSER_LEDGER"), "sqlite:////purser/ledger.db"),
        (("services", "worker", "environment", "RAY_AUTH_MODE"), "disabled"),
        (("services", "worker", "user"), "root"),
        (("services", "head", "cap_drop"), []),
        (("services", "head", "depends_on", "init"), {"condition": "service_completed_successfully"}),
        (("services", "init", "profiles"), []),
        (("services", "init", "restart"), "always"),
    ],
)
def test_what_runs_in_such_a_way_is_found(compose, path, wrong):
    at(compose, path[:-1])[path[-1]] = wrong
    assert unsafe(compose) != []


# make-secrets.sh


@pytest.fixture
def secrets(tmp_path):
    """Run the script in a folder of its own; returns what it made."""
    shutil.copy(INFRA / "compose" / "make-secrets.sh", tmp_path)

    def make() -> dict[str, str]:
        subprocess.run([tmp_path / "make-secrets.sh"], check=True, cwd="/")
        return {file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()}

    return make


def test_the_script_makes_every_secret_once(secrets, tmp_path):
    made = secrets()
    assert {f"secrets/{name}" for name in made} == {secret["file"] for secret in COMPOSE["secrets"].values()}
    drawn = [value for name, value in made.items() if not name.endswith("-url")]
    assert all(len(value) == 64 for value in drawn)
    assert len(set(drawn)) == len(drawn)
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert secrets() == made
    (tmp_path / "secrets" / "ray-token").write_text("")  # as a disk that was full leaves it
    assert secrets()["ray-token"] not in ("", made["ray-token"])


def test_its_urls_are_of_the_ledger_that_compose_runs(secrets):
    made, ledger = secrets(), COMPOSE["services"]["ledger"]["environment"]
    for role in ("owner", "service"):
        url = databases.parse(made[f"{role}-url"])
        assert (url.username, url.password) == (f"purser_{role}", made[f"{role}-password"])
        assert (url.host, url.database) == ("ledger", ledger["POSTGRES_DB"])
    assert ledger["POSTGRES_USER"] == "purser_owner"


def test_git_does_not_take_secrets():
    assert (INFRA / "compose" / ".gitignore").read_text().splitlines() == ["secrets/"]
