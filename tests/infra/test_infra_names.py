"""What the manifests call things is what the code and Ray call them: versions, variables, options, commands, paths. A
wrong one is no error anywhere; it is a setting that does nothing."""

from __future__ import annotations

import re
import subprocess
import tomllib
from functools import cache
from importlib import resources

import pytest
from manifests import INFRA, KUBERAY, documents
from product import REPOSITORY

from cluster import environment

OURS = [
    file
    for file in sorted(INFRA.rglob("*"))
    if file.is_file() and not {"jobs", "dashboards", "secrets", "__pycache__"} & set(file.relative_to(INFRA).parts)
]
TEXTS = {file.relative_to(INFRA).as_posix(): file.read_text() for file in OURS}
ALL = "\n".join(TEXTS.values())
README = re.sub(r"\\\n\s*", " ", TEXTS["README.md"])


def version() -> str:
    """The version of Ray that everything is pinned to."""
    return re.search(r"^ray==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)[1]


def test_ray_has_one_version():
    named = re.findall(r"rayproject/ray:([\d.]+)-py(\d)(\d+)", ALL)
    assert len(named) >= 4
    assert {found for found, *_ in named} == {version()}
    (cluster,) = documents(KUBERAY / "cluster" / "cluster.yaml")
    assert cluster["spec"]["rayVersion"] == version()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    least = tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))
    assert all((int(major), int(minor)) >= least for _, major, minor in named)


def test_the_image_has_the_version_of_the_product():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    named = re.findall(r"purser:(\d[\w.]*)", ALL) + re.findall(r"newTag: (\S+)", ALL)
    assert len(named) >= 5
    assert set(named) == {project["version"]}


def strangers(text: str) -> set[str]:
    """`PURSER_*` variables in `text` that the code does not read."""
    return set(re.findall(r"\bPURSER_[A-Z_]+\b", text)) - {environment.HOME, environment.LEDGER}


def test_our_variables_are_those_the_code_reads():
    assert strangers(ALL) == set()
    assert strangers(ALL.replace("PURSER_HOME", "PURSER_HOMES")) == {"PURSER_HOMES"}


@cache
def _known_to_ray() -> set[str]:
    grep = ["grep", "-rhoE", "--include=*.py", r"\bRAY_[A-Z0-9_]+\b", str(resources.files("ray"))]
    found = subprocess.run(grep, capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def test_rays_variables_are_those_ray_reads():
    arguments = {"RAY_IMAGE"}  # of the Dockerfile
    set_by_ray = {"RAY_HEAD_IP"}  # for the launcher's commands
    named = set(re.findall(r"\bRAY_[A-Z0-9_]+\b", ALL)) - arguments - set_by_ray
    assert len(named) > 8
    assert named - _known_to_ray() == set()
    assert "RAY_AUTH_MODES" not in _known_to_ray()


# Commands


def options_of_ray_start() -> set[str]:
    from ray.scripts.scripts import start

    return {option for parameter in start.params for option in parameter.opts}


def test_ray_is_started_with_options_that_it_has():
    compose = documents(INFRA / "compose" / "compose.yaml")[0]["services"]
    launcher = documents(INFRA / "launcher" / "cluster.yaml")[0]
    commands = [" ".join(compose[name]["command"]) for name in ("head", "worker")]
    commands += launcher["head_start_ray_commands"] + launcher["worker_start_ray_commands"]
    used = set(re.findall(r"(--[a-z-]+)", " ".join(c.partition("ray start")[2] for c in commands)))
    (cluster,) = documents(KUBERAY / "cluster" / "cluster.yaml")
    used |= {f"--{key}" for key in cluster["spec"]["headGroupSpec"]["rayStartParams"]}
    assert len(used) > 6
    assert used - options_of_ray_start() == set()
    assert "--metric-export-port" not in options_of_ray_start()


def unknown(words: list[str]) -> str | None:
    """What of `purser WORDS` the command line does not know."""
    import typer

    import purser

    command = typer.main.get_command(purser.app)
    while words and hasattr(command, "commands"):
        if words[0] not in command.commands:
            return words[0]
        command, words = command.commands[words[0]], words[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    return next((word for word in words if word.startswith("--") and word not in known), None)


def commands_of_purser() -> list[str]:
    """Every `purser ...` that the files in infra run or tell to run."""
    listed = [
        " ".join(word.strip() for word in found.split(","))
        for found in re.findall(r"\[purser, ([^\]]*)\]", ALL)  # a list, as of a pod's command
    ]
    quoted = re.findall(r"`(?:PURSER_LEDGER=\S+ )?purser ([a-z][^`]*)`", README)
    line = r"^(?:    |.*entrypoint: |.*\" )purser ([a-z].*?)(?: >.*|; do|\"\])?$"
    lines = re.findall(line, README + ALL, re.MULTILINE)
    return listed + quoted + lines


def test_the_commands_of_purser_exist():
    found = commands_of_purser()
    assert {"accountant", "budget", "submit", "tune"} <= {command.split()[0] for command in found}
    assert {command: word for command in found if (word := unknown(command.split()))} == {}


def test_a_command_that_is_not_there_is_found():
    assert unknown(["accountant", "init", "--service", "x"]) is None
    assert unknown(["accountant", "inti"]) == "inti"
    assert unknown(["accountant", "init", "--servce", "x"]) == "--servce"


# Texts


def test_paths_in_the_readme_are_there():
    named = set(re.findall(r"(?<!/)\binfra/[\w./-]*\w", README))
    named |= {f"infra/{name}" for name in re.findall(r"`([a-z]+/[\w./-]*)`", README) if name != "tests/infra"}
    made = {"infra/compose/secrets/ray-token", "infra/compose/secrets/grafana-password"}
    assert len(named) > 12
    in_image = {f"infra/{name}" for name in re.findall(r"/opt/purser/(jobs/[\w.-]+)", ALL)}
    assert in_image == {"infra/jobs/digits.yaml"}
    named |= in_image
    assert [name for name in sorted(named - made) if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("name", TEXTS)
def test_no_file_holds_a_password(name):
    held = re.compile(r"://[\w.-]+:(?![$%])[^@\s/]+@")  # a URL with one that is no variable and no %s
    assert held.findall(TEXTS[name]) == []
    assert held.findall("postgresql://purser:word@ledger/books") != []
