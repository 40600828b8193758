"""The whole voyage with real Ray, real workers and real data, run by the real command from a folder that holds the
user's own `training.py` and `cluster/`: a sweep under one budget, what is left, then nothing (P1, P2, P3, P6, P14)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from product import DIGITS

from cluster.accounting.costs import UNIT

pytestmark = pytest.mark.cluster

# Dear steps, so that few trials fill the budget: two fit, the third is refused, and a second sweep can pay for none.
SPACE = "tuning.space={training.noise_multiplier: {choice: [5.0, 4.5, 4.0]}}"
OVERRIDES = ("tuning.trials=3", SPACE)
TRIAL_KEYS = {"id", "config", "status", "planned_steps", "authorised_steps", "cost", "metrics"}


def recompute(entries, order):
    """RDP at `order` of all authorised entries in their order, by dp_accounting alone from what --json printed."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant([order])
    totals = [0.0]
    for entry in entries:
        if entry["kind"] != "authorise":
            continue
        mechanism = entry["mechanism"]
        if mechanism["kind"] == "poisson_subsampled_gaussian":
            event = PoissonSampledDpEvent(mechanism["sample_rate"], GaussianDpEvent(mechanism["noise_multiplier"]))
        else:
            event = GaussianDpEvent(mechanism["scale"] / mechanism["l2_sensitivity"])
        accountant.compose(event, entry["steps"])
        totals.append(float(accountant._rdp[0]))
    return totals


def budget_holds(purser, account):
    """Spent is what the entries say, at no moment over the budget, and dp_accounting agrees."""
    from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

    shown = purser("budget", "show", account, "--json").json
    entries = purser("budget", "history", account, "--json").json["entries"]
    assert shown["spent_cost"] == sum(e["cost"] for e in entries if e["kind"] == "authorise")
    assert all(e["spent_after"] + e["reserved_after"] <= shown["budget_cost"] for e in entries)
    totals = recompute(entries, shown["order"])
    assert totals[-1] == pytest.approx(shown["spent_cost"] / UNIT, rel=1e-9)
    assert max(totals) <= shown["budget_cost"] / UNIT
    if totals[-1]:
        epsilon, _ = compute_epsilon([shown["order"]], [totals[-1]], shown["delta"])
        assert epsilon <= shown["epsilon"]
    assert purser("budget", "verify", account).code == 0
    return shown, entries


def shadows(folder):
    """The user's own files, named like our packages."""
    (folder / "training.py").write_text("raise SystemExit('the file of the user was imported')\n")
    (folder / "cluster").mkdir()
    (folder / "cluster" / "__init__.py").write_text("raise SystemExit('the folder of the user was imported')\n")


@pytest.fixture(scope="module")
def voyage(tmp_path_factory):
    """Two sweeps on one set of books, and the first of them told again."""
    from product import Purser

    root = tmp_path_factory.mktemp("voyage")
    (root / "user").mkdir()
    shadows(root / "user")
    purser = Purser(root / "home", root / "user")
    first = purser("tune", DIGITS, *OVERRIDES)
    second = purser("tune", DIGITS, *OVERRIDES, "training.workers=1", "--json")
    sweep = next(line for line in first.out.splitlines() if line.startswith("Sweep ")).split()[1].rstrip(":")
    again = purser("tune", "--resume", sweep, "--json")
    return purser, first, second, again


def test_the_first_sweep_runs_what_fits_and_refuses_the_rest(voyage):
    purser, first, _, _ = voyage
    assert first.code == 0, first.out + first.err
    assert "user was imported" not in first.out + first.err
    assert "refused" in first.out
    assert first.out.count("completed, accuracy") == 2
    for noise in ("WARNING", "(raylet)", "TrainController", "absl", "Traceback"):
        assert noise not in first.out + first.err, "only the product's own lines are on the screen"
    log = Path(next(line for line in first.out.splitlines() if "Ray's own output" in line).rpartition(": ")[2])
    assert log.stat().st_size > 0


def test_what_is_over_is_told_again_and_the_second_sweep_gets_nothing(voyage):
    _, _, second, again = voyage
    assert again.code == 0, again.err
    assert set(again.json) >= {"sweep", "mode", "status", "account", "trials", "best", "release"}
    assert {key for trial in again.json["trials"] for key in trial} >= TRIAL_KEYS
    statuses = [trial["status"] for trial in again.json["trials"]]
    assert statuses == ["completed", "completed", "refused"]
    assert again.json["best"]["metrics"]["accuracy"] > 0.5
    assert second.code == 3
    assert second.json["status"] == "refused"
    assert {trial["status"] for trial in second.json["trials"]} == {"refused"}
    assert second.json["release"] is None
    assert "What would fit" in second.err


def test_the_ledger_was_never_over_its_budget(voyage):
    purser, *_ = voyage
    shown, entries = budget_holds(purser, "digits/train")
    kinds = [entry["kind"] for entry in entries]
    assert kinds.count("refuse") == 1 + 3
    assert kinds.count("settle") == 2
    assert shown["reserved_cost"] == 0
    assert shown["spent_cost"] > 0.8 * shown["budget_cost"]
    shown, _ = budget_holds(purser, "digits/validation")
    assert shown["spent_cost"] == 2 * 120_000_000_000


def test_a_broken_accountant_would_be_seen(voyage):
    """The same recomputation on a history in which one more sweep was let through."""
    purser, *_ = voyage
    shown = purser("budget", "show", "digits/train", "--json").json
    entries = purser("budget", "history", "digits/train", "--json").json["entries"]
    assert max(recompute(entries * 2, shown["order"])) > shown["budget_cost"] / UNIT


def test_the_release_is_whole_and_its_statement_true(voyage, monkeypatch):
    from safetensors.torch import load_file

    from cluster.accounting.books import Books
    from cluster.accounting.ledger import Ledger
    from training.jobfile import load
    from training.preparation import prepare
    from training.shards import Prepared
    from tuning.config import SweepJob

    purser, first, _, _ = voyage
    release = Path(next(line for line in first.out.splitlines() if "Released: " in line).rpartition("Released: ")[2])
    written = ["statement.html", "statement.json", "statement.md", "weights.safetensors"]
    assert sorted(path.name for path in release.iterdir()) == written
    said = json.loads((release / "statement.json").read_text())
    entries = purser("budget", "history", "digits/train", "--json").json["entries"]
    charges = said["partitions"][0]["charges"]
    assert sum(charge["steps"] for charge in charges) == 80
    assert {charge["hash"] for charge in charges} <= {entry["hash"] for entry in entries}
    head = said["partitions"][0]["head"]
    assert purser("budget", "verify", "digits/train", "--head", f"{head['seq']}:{head['hash']}").code == 0
    for name in ("statement.md", "statement.html"):
        assert f"{head['seq']}:{head['hash']}" in (release / name).read_text()
    proven = purser("report", release.parent.name, "--verify", release / "statement.json", "--json")
    assert (proven.code, proven.json["valid"]) == (0, True), proven.err
    said["training"]["noise_multiplier"] *= 2
    (purser.folder / "edited.json").write_text(json.dumps(said))
    assert purser("report", release.parent.name, "--verify", purser.folder / "edited.json").code == 1

    job = load(SweepJob, DIGITS)
    books = Books(Ledger(f"sqlite:///{purser.home}/ledger.db"))
    monkeypatch.setenv("PURSER_HOME", str(purser.home))
    prepared = Prepared.at(prepare(job, books.source_key(), books.partition_key("digits")))
    validation = prepared.shard("validation", 0, 1)
    weights = load_file(release / "weights.safetensors")
    logits = validation.features[:] @ weights["0.weight"].T + weights["0.bias"]
    accuracy = (logits.argmax(1) == validation.labels[:]).double().mean().item()
    # Cheap trials at σ = 5 reach 0.94; far below it would mean that something else was released.
    assert accuracy > 0.85
    assert abs(accuracy - said["released"]["metrics"]["accuracy"]) < 0.08  # six standard deviations of its noise


KILLS = 20


def started(purser, *arguments):
    """The real command in a process of its own, and its lines as they come."""
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "purser"), *map(str, arguments)],
        cwd=purser.folder,
        env=purser.environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    return process, iter(process.stdout.readline, "")


def test_a_sweep_that_is_killed_at_any_moment_goes_on(purser, soak):
    """kill -9 of its driver: what is over is neither run nor charged again, the rest goes on under a new attempt, with
    the candidates that were drawn at the start; every step that ran is charged, those that ran twice are charged twice,
    and the numbers are the ledger's. In `make test` a sweep's whole cluster is killed: `cluster/test_nodes.py`."""
    if not soak:
        pytest.skip("make soak kills a sweep twenty times")
    space = "tuning.space={training.noise_multiplier: {uniform: [60, 90]}}"
    cheap = (
        "training.steps=40",
        "training.block=10",
        "training.workers=1",
        "tuning.trials=2",
        "tuning.search=random",
        space,
    )
    process, told = started(purser, "tune", DIGITS, *cheap)
    sweep = next(line for line in told if line.startswith("Sweep ")).split()[1].rstrip(":")
    folder = purser.home / "runs" / sweep
    candidates = (folder / "candidates.json").read_bytes()
    for kill in range(KILLS):
        if kill == 0:  # once in the middle of a run
            next(line for line in told if " of 40 steps" in line)
        else:
            time.sleep(random.uniform(0, 25))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if kill + 1 < KILLS:
            process, told = started(purser, "tune", "--resume", sweep)
    over = {path.parent.name for path in folder.glob("trials/*/outcome.json")}
    burnt = {entry["key"] for entry in purser("budget", "history", "digits/train", "--json").json["entries"]}

    ended = purser("tune", "--resume", sweep, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["sweep"] == sweep
    assert (folder / "candidates.json").read_bytes() == candidates
    assert [trial["config"] for trial in ended.json["trials"]] == json.loads(candidates)
    assert [trial["status"] for trial in ended.json["trials"]] == ["completed"] * 2
    shown, entries = budget_holds(purser, "digits/train")
    assert shown["reserved_cost"] == 0
    assert burnt <= {entry["key"] for entry in entries}, "nothing was taken back"
    for trial in ended.json["trials"]:
        mine = [entry for entry in entries if entry["key"].split(":")[1] == trial["id"]]
        paid = [entry for entry in mine if entry["kind"] == "authorise"]
        assert trial["authorised_steps"] == sum(entry["steps"] for entry in paid) >= 40
        assert trial["cost"] == sum(entry["cost"] for entry in paid)
        assert [entry["kind"] for entry in mine].count("settle") == 1
        last = [entry for entry in mine if entry["kind"] == "open"][-1]
        again = sum(entry["steps"] for entry in paid if entry["attempt"] == last["attempt"])
        assert again == 40 - last["body"]["done"]
        if trial["id"].rpartition("-")[2] in over:
            assert {entry["key"] for entry in paid} <= burnt, "it was over, and ran again"
    again = purser("tune", "--resume", sweep, "--json")
    assert again.json["trials"] == ended.json["trials"]
    assert purser("budget", "show", "digits/train", "--json").json["head"] == shown["head"]
    refused = purser("train", "--resume", sweep)
    assert refused.code == 2
    assert "purser tune --resume" in refused.err
