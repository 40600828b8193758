"""The house itself: what is packaged, and which rooms stay free of heavy imports when they are really imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from product import REPOSITORY


def test_the_wheel_holds_the_packages_and_no_tests(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "purser.py"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("cluster", "training", "tuning", "tests", "infra"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("purser-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name.split("/")[0] for name in archive.namelist() if ".dist-info" not in name}
    assert names == {"purser.py", "cluster", "training", "tuning"}


def test_every_dependency_has_an_exact_version():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
    }
    for wanted in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        name = wanted.partition("[")[0].partition(">")[0].lower()
        assert name in pinned, f"{name} is not in constraints.txt"
    assert "://" not in (REPOSITORY / "constraints.txt").read_text()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("purser", "ray torch opendp dp_accounting pyarrow numpy"),
        ("cluster.accounting.leases", "ray torch numpy"),
        ("training.config", "ray torch numpy"),
        ("training.scaffold", "ray torch numpy pyarrow"),
        ("tuning.plan", "ray torch"),
        ("training.engine.rehearsal", "ray deepspeed"),
        ("training.models", "ray deepspeed"),
        ("training.audit.power", "ray torch dp_accounting"),
        ("training.audit.claim", "ray torch dp_accounting"),
        ("training.audit.membership", "ray torch dp_accounting"),
    ],
)
def test_a_room_imports_nothing_heavy(module, absent):
    code = f"import sys, {module}; print(*[name for name in '{absent}'.split() if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []
