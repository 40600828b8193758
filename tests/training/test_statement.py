"""The privacy statement says what the books say (P5, P14): budgets, charges, hashes and heads of a real ledger, and
nothing that is hidden in it (P13)."""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from contextlib import closing

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cluster.accounting.books import Books
from cluster.accounting.costs import block_cost, epsilon_of
from cluster.accounting.leases import Leases
from cluster.accounting.ledger import Ledger
from cluster.accounting.schema import entry_hash
from cluster.accounting.verify import verify
from training.config import Job, Optimizer
from training.engine.run import DPSGDRun
from training.engine.trainer import PrivateTrainer
from training.jobfile import parse
from training.release import EXCLUDED, WEIGHTS, markdown, statement, write_release, write_weights

JOB = parse(
    Job,
    {
        "account": "people",
        "privacy": {"epsilon": 3.0, "delta": 1e-4, "unit": "person", "units": 2000, "max_records_per_unit": 2},
        "data": {
            "source": "people.csv",
            "features": {"age": {"range": [0, 120]}},
            "label": {"column": "label", "categories": ["no", "yes"]},
        },
        "model": {"kind": "linear"},
        "training": {
            "steps": 50,
            "block": 20,
            "expected_batch_size": 200,
            "noise_multiplier": 6.0,
            "max_grad_norm": 0.5,
        },
    },
)
RUN = "people-20260101-000000-abcd"
METRICS = {"correct": 310, "wrong": 95, "accuracy": 0.765, "accuracy_error": 0.021}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "ledger.db"


@pytest.fixture
def books(file):
    """A ledger on which another run was charged before, and ours for two of its three blocks and an evaluation."""
    books = Books(Ledger(f"sqlite:///{file}"))
    train, validation = JOB.accounts
    plans = dict(zip(JOB.accounts, ([charge] for charge in JOB.charges()), strict=True))
    books.create(JOB.dataset(["ab" * 32]), 3.0, 1e-4, plans, 8)
    leases = Leases(books)
    for lease, blocks in (("earlier", 1), (RUN, 2)):
        assert leases.reserve(lease, lease, JOB.charges()).fits
        epoch = leases.open(lease, "nonce", 0).epoch
        for block in range(1, blocks + 1):
            assert leases.authorise(lease, epoch, train, block)
    assert leases.authorise(RUN, epoch, validation, 1)
    leases.close(RUN, "settle", "completed")
    return books


@pytest.fixture
def said(books):
    accounts = [books.show(name) for name in JOB.accounts]
    return statement(JOB, RUN, accounts, entries(books), METRICS, "none in this run.")


def entries(books):
    return {
        name: [row for row in books.history(name) if row["lease"] == RUN and row["kind"] == "authorise"]
        for name in JOB.accounts
    }


def test_budget_and_charges_are_the_books_own(books, said):
    """Recomputed here from the declared plan: two blocks of 20 steps, one evaluation."""
    train, validation = said["partitions"]
    mechanisms = [charge.mechanism for charge in JOB.charges()]
    order = books.show("people/train").order
    blocks = [block_cost(mechanisms[0], order, 0, 20), block_cost(mechanisms[0], order, 20, 40)]
    assert [charge["cost"] for charge in train["charges"]] == blocks
    assert [charge["steps"] for charge in train["charges"]] == [20, 20]
    assert train["cost_of_run"] == sum(blocks)
    assert train["spent_cost"] == sum(blocks) + blocks[0]  # the earlier run's block is spent too, but is not this run's
    one = block_cost(mechanisms[1], validation["order"], 0, 1)
    assert ([charge["cost"] for charge in validation["charges"]], validation["spent_cost"]) == ([one], one)
    for part in said["partitions"]:
        account = books.show(part["account"])
        assert part["epsilon_of_run"] == epsilon_of(part["cost_of_run"], 1e-4, account.order)
        assert part["epsilon_of_run"] <= 3.0
        for key in ("epsilon", "delta", "order", "budget_cost", "spent_cost", "head"):
            assert part[key] == getattr(account, key)


def test_hashes_and_heads_are_those_of_the_chain(books, said):
    with books.ledger.reading() as view:
        for part in said["partitions"]:
            rows = list(view.of_account(part["account"]))
            assert verify(part["account"], rows, (part["head"]["seq"], part["head"]["hash"])).valid
            for charge in part["charges"]:
                row = rows[charge["seq"] - 1]
                assert charge["hash"] == row["hash"] == entry_hash(row)
                assert charge["cost"] == row["cost"]
                assert charge["kind"] == "authorise"


def test_what_is_protected_and_how_is_what_was_declared(said):
    assert said["schema"] == "purser.privacy-statement/1"
    assert said["run"] == RUN
    assert said["protected"] == {
        "dataset": "people",
        "unit": "person",
        "adjacency": "one unit with all of its records added or removed",
        "max_records_per_unit": 2,
        "declared_units": 2000,
    }
    assert (said["guarantee"]["epsilon"], said["guarantee"]["delta"]) == (3.0, 1e-4)
    training = said["training"]
    run = JOB.run()
    for key in ("noise_multiplier", "max_grad_norm", "sample_rate", "expected_batch_size"):
        assert training[key] == getattr(run, key)
    assert training["planned_steps"] == 50
    assert said["released"] == {"target": "weights", "file": WEIGHTS, "metrics": METRICS}
    assert said["tuning"] == "none in this run."
    assert said["excluded"] == list(EXCLUDED)
    assert any("side channels" in line for line in said["excluded"])


def test_a_statement_is_for_machines_and_for_people(said):
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    text = markdown(said)
    assert "(3, 0.0001)-differential privacy" in text
    assert "Each person of the dataset **people**" in text
    assert "noise_multiplier 6, max_grad_norm 0.5, sample_rate 0.125, 50 steps planned" in text
    for part in said["partitions"]:
        row = next(line for line in text.splitlines() if line.startswith(f"| {part['account']} | 3 |"))
        said_epsilon = float(row.split("|")[5])
        assert 0 <= said_epsilon - part["epsilon_of_run"] < 1e-3, "rounded, but never below what the books charge"
        assert f"{part['spent_cost'] / part['budget_cost']:.1%}" in row
        assert f"{part['head']['seq']}:{part['head']['hash']}" in row
        for charge in part["charges"]:
            cells = part["account"], charge["seq"], charge["steps"], f"{charge['cost']:,}", charge["hash"][:16]
            assert "| " + " | ".join(map(str, cells)) in text
    assert "Accuracy 0.765 ± 0.021" in text
    for line in EXCLUDED:
        assert line in text


def test_a_row_is_called_a_record(said):
    assert "Each record (row) of" in markdown({**said, "protected": {**said["protected"], "unit": "row"}})


def test_a_run_without_metrics_says_so(books, said):
    accounts = [books.show(name) for name in JOB.accounts]
    without = statement(JOB, RUN, accounts, entries(books), {}, "none in this run.")
    assert without["released"]["metrics"] == {}
    assert "Accuracy" not in markdown(without)
    assert "Metrics" not in markdown(without)


def test_public_data_is_named_with_its_content(books, tmp_path):
    file = tmp_path / "public.csv"
    file.write_text("age,label\n20,no\n")
    job = JOB.with_values({"evaluation": {"on": "public", "source": str(file)}})
    accounts = [books.show(name) for name in JOB.accounts]
    said = statement(job, RUN, accounts, entries(books), METRICS, "none in this run.")
    content = hashlib.sha256(file.read_bytes()).hexdigest()
    assert said["public_data"].startswith(f"public.csv (SHA-256 {content}), declared public by the job")
    assert str(tmp_path) not in json.dumps(said), "where it lies is nobody's business"
    text = markdown(said)
    assert "Metrics: accuracy on public records" in text
    assert "Accuracy 0.765 ± 0.021 (95 % of the chance of which public records were judged)." in text
    assert content in text


def test_a_loss_is_told_as_one(books):
    job = JOB.with_values({"evaluation.metric": "loss"})
    accounts = [books.show(name) for name in JOB.accounts]
    metrics = {"clipped_loss": 1.5, "clipped_loss_error": 0.25}
    text = markdown(statement(job, RUN, accounts, entries(books), metrics, "none in this run."))
    assert "Metrics: noised clipped loss" in text
    assert "Clipped loss 1.500 ± 0.250 (95 % of the noise)." in text


def test_nothing_hidden_is_in_it(file, said):
    """Neither the ledger's HMAC key nor the partition key: who held them could test guesses about people."""
    with closing(sqlite3.connect(file)) as connection:
        hidden = dict(connection.execute("SELECT name, value FROM secrets"))
    assert {"ledger:hmac", "partition:people"} <= set(hidden)
    for name in ("ledger:hmac", "partition:people"):
        for text in (json.dumps(said), markdown(said)):
            assert hidden[name] not in text


def test_weights_and_statement_are_written_together(tmp_path, said):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    trainer = PrivateTrainer(model, Optimizer(), DPSGDRun(1.0, 1.0, 0.5, 4, 2, 1, 8))
    write_weights(trainer.unhook(), tmp_path)
    assert not (tmp_path / f".{WEIGHTS}").exists()
    release = write_release(tmp_path, tmp_path / WEIGHTS, said)
    assert sorted(path.name for path in release.iterdir()) == ["statement.json", "statement.md", WEIGHTS]
    assert json.loads((release / "statement.json").read_text()) == said
    assert (release / "statement.md").read_text() == markdown(said)
    weights = load_file(release / WEIGHTS)
    assert set(weights) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor)


def test_a_statement_holds_no_nan(tmp_path, said):
    (tmp_path / WEIGHTS).write_bytes(b"")
    bad = {**said, "released": {**said["released"], "metrics": {"accuracy": math.nan}}}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_release(tmp_path, tmp_path / WEIGHTS, bad)
