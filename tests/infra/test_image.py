"""The image and the scripts in it and around it: its context makes the whole product and nothing else, the accountant's
start waits and tells nobody the URL, the ledger's roles are what a real PostgreSQL makes of them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import psycopg
import pytest
import yaml
from manifests import INFRA, KUBERAY
from postgresql import SUPERUSER
from product import REPOSITORY

DOCKERFILE = (INFRA / "docker" / "Dockerfile").read_text()
IGNORED = (INFRA / "docker" / "Dockerfile.dockerignore").read_text()
ACCOUNTANT = INFRA / "docker" / "accountant.sh"
RULE = KUBERAY / "monitoring" / "prometheus-rule.sh"


def context() -> list[Path]:
    """What Docker is sent."""
    lines = [line for line in IGNORED.splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"  # nothing, but for what follows
    return [REPOSITORY / line[1:] for line in lines if line.startswith("!")]


def copied() -> list[str]:
    """What is copied out of the context."""
    commands = re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
    return [word for command in commands for word in command.split()[:-1] if not word.startswith("--")]


def test_the_context_holds_what_is_copied_and_no_more():
    sent = context()
    assert all(path.exists() for path in sent)
    assert [name for name in copied() if name != "." and REPOSITORY / name not in sent] == []
    secrets = INFRA / "compose"
    assert not any(secrets.is_relative_to(path) or path.is_relative_to(secrets) for path in sent)


def test_the_context_is_enough_for_the_product(tmp_path):
    for path in context():
        target = tmp_path / "source" / path.relative_to(REPOSITORY)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, target)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(pip, cwd=tmp_path / "source", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("purser-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.endswith(".py")}
    roots = [REPOSITORY / "purser.py", *(REPOSITORY / room for room in ("cluster", "training", "tuning"))]
    ours = {file for root in roots for file in ([root] if root.is_file() else root.rglob("*.py"))}
    assert names == {file.relative_to(REPOSITORY).as_posix() for file in ours}


def test_the_image_runs_as_nobody_special_and_by_number():
    user = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)[-1]
    uid, gid = map(int, user.split(":"))
    assert uid > 0
    (cluster,) = yaml.safe_load_all((KUBERAY / "cluster" / "cluster.yaml").read_text())
    pod = cluster["spec"]["headGroupSpec"]["template"]["spec"]["securityContext"]
    assert (pod["runAsUser"], pod["runAsGroup"], pod["fsGroup"]) == (uid, gid, gid)
    assert f"--chown={uid}:{gid}" in DOCKERFILE
    assert f"-o {uid} -g {gid} -m 0700 /purser" in DOCKERFILE


# accountant.sh


STAND_IN = """#!/bin/sh
echo "$(basename "$0") $* ${PURSER_LEDGER-}" >> "$CALLS"
left=$(cat "$CALLS.$(basename "$0")" 2>/dev/null || echo 0)
[ "$left" -gt 0 ] || exit 0
echo $((left - 1)) > "$CALLS.$(basename "$0")"
exit 1
"""


@pytest.fixture
def accountant(tmp_path):
    """Run the script with stand-ins that write down how they were called, and fail as often as they are told."""
    for name in ("ray", "purser", "sleep"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    calls, url = tmp_path / "calls", tmp_path / "url"
    url.write_text("postgresql://purser_service:word@ledger/books")

    def run(**failures: int) -> list[str]:
        for name, times in failures.items():
            calls.with_name(f"calls.{name}").write_text(str(times))
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)}
        subprocess.run([ACCOUNTANT, url], env=environment, check=True, timeout=60)
        return calls.read_text().splitlines()

    return run


HEALTHY, STARTED, SLEPT = (
    "ray health-check ",
    "purser accountant start postgresql://purser_service:word@ledger/books",
    "sleep 5 ",
)


def test_the_accountant_starts_once_ray_and_the_ledger_are_there(accountant):
    assert accountant(ray=2, purser=1) == [
        *(HEALTHY, SLEPT) * 2,  # no Ray yet: nobody was told the URL
        *(HEALTHY, STARTED, SLEPT),  # no ledger yet
        *(HEALTHY, STARTED),
    ]


def test_the_accountant_waits_for_its_file(accountant, tmp_path):
    (tmp_path / "url").rename(tmp_path / "later")
    # The stand-in for sleep brings the file, as `ray rsync-up` does.
    (tmp_path / "sleep").write_text(f'#!/bin/sh\nmv "{tmp_path}/later" "{tmp_path}/url"\n')
    assert accountant() == [HEALTHY, HEALTHY, STARTED]


# roles.sh


PASSWORD = "it's \"quoted\" \\ $HOME :'x'"  # whatever a shell or psql might read into it


@pytest.fixture(scope="module")
def books(postgresql):
    """A database as the image's first start and `purser accountant init` leave it; yields (server, its name)."""
    if shutil.which("psql") is None:
        pytest.skip("psql is not installed; `apt-get install postgresql-client` makes these tests run")
    name = postgresql.create()
    postgresql.sql(name, f"ALTER DATABASE {name} OWNER TO {SUPERUSER}", f"ALTER SCHEMA public OWNER TO {SUPERUSER}")
    password = postgresql.folder / "service-password"
    password.write_text(PASSWORD)
    environment = {
        "PATH": os.environ["PATH"],
        "PGHOST": "127.0.0.1",
        "PGPORT": str(postgresql.port),
        "POSTGRES_USER": SUPERUSER,
        "POSTGRES_DB": name,
        "SERVICE_PASSWORD_FILE": str(password),
    }
    subprocess.run([KUBERAY / "ledger" / "roles.sh"], env=environment, check=True, capture_output=True)
    owner = {**os.environ, "PURSER_LEDGER": postgresql.url(name, SUPERUSER)}
    command = [Path(sys.executable).with_name("purser"), "accountant", "init", "--service", "purser_service"]
    subprocess.run(command, env=owner, check=True, capture_output=True)
    yield postgresql, name
    postgresql.drop(name)
    postgresql.sql("postgres", "DROP ROLE purser_service")


def as_service(books, statement: str) -> None:
    server, name = books
    with psycopg.connect(server.url(name, "purser_service")) as connection:
        connection.execute(statement)


def test_the_service_may_read_and_append(books):
    as_service(books, "SELECT * FROM entries")
    as_service(books, "INSERT INTO secrets (name, value) VALUES ('dataset:x', 'y')")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET cost = 0",
        "DELETE FROM entries",
        "TRUNCATE secrets",
        "DROP TABLE entries",
        "CREATE TABLE other (x int)",
        "CREATE ROLE other",
    ],
)
def test_the_service_may_do_nothing_else(books, statement):
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        as_service(books, statement)


def test_its_password_is_the_one_in_the_file(books):
    server, name = books
    with psycopg.connect(server.url(name, SUPERUSER)) as connection:
        (kept,) = connection.execute("SELECT rolpassword FROM pg_authid WHERE rolname = 'purser_service'").fetchone()
    rounds, salt, stored = re.fullmatch(r"SCRAM-SHA-256\$(\d+):([^$]+)\$([^:]+):.*", kept).groups()

    def hashed(password: str) -> str:  # RFC 5802
        salted = hashlib.pbkdf2_hmac("sha256", password.encode(), base64.b64decode(salt), int(rounds))
        return base64.b64encode(hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()).decode()

    assert hashed(PASSWORD) == stored
    assert hashed(PASSWORD.replace("\\", "")) != stored


def test_others_may_not_even_connect(books):
    server, name = books
    with psycopg.connect(server.url("postgres", SUPERUSER), autocommit=True) as connection:
        connection.execute("CREATE ROLE passer_by LOGIN")
    try:
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            psycopg.connect(server.url(name, "passer_by"))
    finally:
        server.sql("postgres", "DROP ROLE passer_by")


# prometheus-rule.sh

TRICKY = """# a comment
groups:
  - name: purser
    rules:
      - alert: "Quoted: %"
        expr: |
          sum(x)
            > 0.8
        annotations: {summary: 'of {{ $labels.account }}',
          description: "two
            lines"}
"""


def rule(*arguments: object) -> dict:
    printed = subprocess.run([RULE, *arguments], capture_output=True, text=True, check=True, cwd="/").stdout
    (document,) = yaml.safe_load_all(printed)
    return document


def test_the_rules_have_one_source(tmp_path):
    (tmp_path / "rules.yml").write_text(TRICKY)
    for given, source in ((), INFRA / "prometheus" / "rules.yml"), ((tmp_path / "rules.yml",), tmp_path / "rules.yml"):
        made = rule(*given)
        assert (made["apiVersion"], made["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
        assert made["spec"] == yaml.safe_load(source.read_text())
