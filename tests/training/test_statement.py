"""The privacy statement says what the books say (P5, P14): budgets, charges, hashes and heads of a real ledger, and
nothing that is hidden in it (P13). It has one schema, and the same in it in all of its forms."""

from __future__ import annotations

import hashlib
import html
import json
import math
import re
import sqlite3
from contextlib import closing
from html.parser import HTMLParser

import pytest
import torch
from jsonschema import Draft202012Validator
from jsonschema import ValidationError as Misshapen
from pydantic import ValidationError
from records import JOB, METRICS, RUN, books_at, said_of
from safetensors.torch import load_file
from torch import nn

from cluster.accounting.costs import block_cost, epsilon_of
from cluster.accounting.schema import entry_hash
from cluster.accounting.verify import verify
from cluster.errors import UsageError
from training import page as markup
from training.claims import EXCLUDED
from training.engine.run import DPSGDRun
from training.engine.trainer import PrivateTrainer
from training.proof import prove
from training.release import write_release, write_statement, write_weights
from training.released import COST, Released, leave
from training.rendering import audit, markdown, page
from training.sections import Optimizer
from training.statement import SCHEMA, WEIGHTS, Statement, read

AUDIT = {
    "method": "one run",
    "score": "loss",
    "canaries": 500,
    "guesses": 100,
    "correct": 61,
    "confidence": 0.95,
    "delta": 1e-5,
    "epsilon_lower_bound": 0.1239,
    "ceiling": 3.4798,
    "epsilon_claimed": 2.0001,
    "verdict": "not contradicted",
    "exposure": None,
}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "ledger.db"


@pytest.fixture
def books(file):
    return books_at(file)


@pytest.fixture
def said(books):
    return said_of(books)


def test_budget_and_charges_are_the_books_own(books, said):
    """Recomputed here from the declared plan: two blocks of 20 steps, one evaluation."""
    train, validation = said.partitions
    mechanisms = [charge.mechanism for charge in JOB.charges()]
    order = books.show("people/train").order
    blocks = [block_cost(mechanisms[0], order, 0, 20), block_cost(mechanisms[0], order, 20, 40)]
    assert [charge.cost for charge in train.charges] == blocks
    assert [charge.steps for charge in train.charges] == [20, 20]
    assert (train.authorised_steps, train.planned.steps, train.planned.block) == (40, 50, 20)
    assert train.cost_of_run == sum(blocks)
    assert train.spent_cost == sum(blocks) + blocks[0]  # the earlier run's block is spent too, but is not this run's
    one = block_cost(mechanisms[1], validation.order, 0, 1)
    assert ([charge.cost for charge in validation.charges], validation.spent_cost) == ([one], one)
    for part in said.partitions:
        account = books.show(part.account)
        assert part.epsilon_of_run == epsilon_of(part.cost_of_run, 1e-4, account.order)
        assert part.epsilon_of_run <= 3.0
        for key in ("epsilon", "delta", "order", "budget_cost", "spent_cost"):
            assert getattr(part, key) == getattr(account, key)
        assert part.head.model_dump() == account.head
        assert all(charge.mechanism == part.planned.mechanism for charge in part.charges)


def test_hashes_and_heads_are_those_of_the_chain(books, said):
    with books.ledger.reading() as view:
        for part in said.partitions:
            rows = list(view.of_account(part.account))
            assert verify(part.account, rows, (part.head.seq, part.head.hash)).valid
            for charge in part.charges:
                row = rows[charge.seq - 1]
                assert charge.hash == row["hash"] == entry_hash(row)
                assert charge.cost == row["cost"]
                assert charge.kind == "authorise"


def test_what_is_protected_and_how_is_what_was_declared(said):
    said = said.as_json()
    assert said["schema"] == SCHEMA == "purser.privacy-statement/2"
    assert said["run"] == RUN
    assert said["protected"] == {
        "dataset": "people",
        "unit": "person",
        "adjacency": "one unit with all of its records added or removed",
        "max_records_per_unit": 2,
        "declared_units": 2000,
        "delta_below_one_over_units": True,
    }
    assert (said["guarantee"]["epsilon"], said["guarantee"]["delta"]) == (3.0, 1e-4)
    training = said["training"]
    run = JOB.run()
    for key in ("noise_multiplier", "max_grad_norm", "sample_rate", "expected_batch_size"):
        assert training[key] == getattr(run, key)
    assert training["planned_steps"] == 50
    assert said["released"] == {"target": "weights", "file": WEIGHTS, "metrics": METRICS, "sha256": {}}
    assert (said["tuning"], said["mode"], said["audits"]) == ("none in this run.", "none", [])
    assert said["excluded"] == list(EXCLUDED)
    assert any("side channels" in line for line in said["excluded"])
    results = {check["check"]: check["result"] for check in said["checks"]}
    assert set(results.values()) == {"passed", "not checked", "excluded"}
    assert results["floating point, timing, memory, crashes"] == "excluded"
    assert results["every number that the ledger knows follows from it"] == "not checked", "when it is written"


# One schema.


def test_what_is_written_is_of_the_schema_and_reads_back(tmp_path, said):
    written = json.loads(json.dumps(said.as_json(), allow_nan=False))
    Draft202012Validator.check_schema(Statement.model_json_schema())
    schema = Draft202012Validator(Statement.model_json_schema())
    schema.validate(written)
    assert written == said.as_json()
    (tmp_path / "statement.json").write_text(json.dumps(written))
    assert read(tmp_path / "statement.json", "STATEMENT") == said
    for section in (written, *(part for part in written.values() if isinstance(part, dict)), written["partitions"][0]):
        if section is written["released"]["metrics"]:
            continue
        section["surplus"] = 1
        with pytest.raises(Misshapen, match="surplus"):
            schema.validate(written)
        with pytest.raises(ValidationError, match="surplus"):
            Statement.model_validate_json(json.dumps(written))
        del section["surplus"]


def test_keys_of_the_first_schema_stay(said):
    said = said.as_json()
    assert set(said) >= {
        *("schema", "run", "made_at", "protected", "guarantee", "released", "accounting", "training", "tuning"),
        *("partitions", "evaluation", "public_data", "audits", "excluded"),
    }
    assert set(said["accounting"]) >= {"method", "sampling", "libraries"}
    assert set(said["partitions"][0]) >= {
        *("account", "epsilon", "delta", "order", "budget_cost", "spent_cost", "head", "cost_of_run"),
        *("epsilon_of_run", "charges"),
    }
    assert set(said["partitions"][0]["charges"][0]) == {"seq", "kind", "mechanism", "steps", "cost", "hash"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("{", "no JSON"),
        ("[]", "no privacy statement"),
        ('{"guarantee": {}}', "schema: field required"),
        ('{"schema": "purser.privacy-statement/1"}', "schema 'purser.privacy-statement/1'"),
        ('{"schema": "purser.privacy-statement/2"}', "no privacy statement (run: field required)"),
        (b"\xff\xfe", "no text"),
    ],
)
def test_what_is_no_statement_is_refused_in_a_sentence(tmp_path, text, words):
    file = tmp_path / "statement.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=f"^STATEMENT: {re.escape(str(file))} ") as caught:
        read(file, "STATEMENT")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_number_of_another_type_is_refused(tmp_path, said):
    for wrong in (True, "7", 7.5, None):
        written = said.as_json()
        written["partitions"][0]["spent_cost"] = wrong
        (tmp_path / "statement.json").write_text(json.dumps(written))
        with pytest.raises(UsageError, match=r"partitions\.0\.spent_cost"):
            read(tmp_path / "statement.json", "STATEMENT")


# One object, three forms.


def leaves(value, name=""):
    """Every value of a JSON object that is no object or list, by its dotted name."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield from leaves(one, f"{name}.{i}")
    else:
        yield name, value


def shown(text, said):
    """The names of the values of `said` that `text` does not show."""
    text = html.unescape(text)
    missing = []
    for name, value in leaves(said.as_json()):
        forms = {str(value), f"{value:,}" if isinstance(value, int) else str(value)}
        if isinstance(value, float):
            forms |= {f"{value:g}", f"{value:.3f}", f"{math.ceil(value * 1000) / 1000:.3f}"}
        elif isinstance(value, bool):
            forms |= {"yes" if value else "no"}
        elif isinstance(value, str):
            forms |= {value.replace("_", " "), *([value[:16]] if len(value) == 64 else [])}
        if not any(form in text for form in forms):
            missing.append(name)
    return missing


HIDDEN = {
    "partitions.0.budget_cost",  # shown as a share
    "partitions.0.spent_cost",
    "partitions.0.cost_of_run",
    "partitions.1.budget_cost",
    "partitions.1.spent_cost",
    "released.metrics.correct",
    "released.metrics.wrong",
}


def test_every_form_shows_everything(said):
    said = said.model_copy(update={"generated": {"file": "texts.jsonl", "temperature": 0.8}})
    for text in (markdown(said), page(said)):
        assert set(shown(text, said)) <= HIDDEN
        for part in said.partitions:
            assert f"{part.head.seq}:{part.head.hash}" in text
            assert f"{part.spent_cost / part.budget_cost:.1%}" in text
        assert "training.max_grad_norm" in shown(text.replace("0.5", ""), said), "a form that leaves one out is seen"


def test_a_statement_is_for_people(said):
    text = markdown(said)
    assert "(3, 0.0001)-differential privacy" in text
    assert "Each person of the dataset people" in text
    for line in ("- noise multiplier: 6", "- max grad norm: 0.5", "- sample rate: 0.125", "- planned steps: 50"):
        assert line in text.splitlines()
    for part in said.partitions:
        row = next(line for line in text.splitlines() if line.startswith(f"| {part.account} | 3 |"))
        said_epsilon = float(row.split("|")[5])
        assert 0 <= said_epsilon - part.epsilon_of_run < 1e-3, "rounded, but never below what the books charge"
        assert f"{part.spent_cost / part.budget_cost:.1%}" in row
        for charge in part.charges:
            cells = part.account, charge.seq, charge.steps, f"{charge.cost:,}", charge.hash[:16]
            assert "| " + " | ".join(map(str, cells)) in text
    assert "Accuracy 0.765 ± 0.021" in text
    assert "No audit was made of this release." in text
    for line in EXCLUDED:
        assert line in text


def test_a_granted_budget_is_never_rounded(said):
    granted = 2.3456784
    part = said.partitions[0].model_copy(update={"epsilon": granted})
    guarantee = said.guarantee.model_copy(update={"epsilon": granted})
    said = said.model_copy(update={"partitions": (part,), "guarantee": guarantee})
    for text in (markdown(said), page(said)):
        assert text.count("2.3456784") == 2
        assert "2.34568" not in text.replace("2.3456784", "")


def test_an_audit_is_a_sentence_with_its_power(said):
    sentence = audit(AUDIT)
    assert sentence == (
        "one run, loss: 500 canaries, 100 guesses, 61 right: ε ≥ 0.123 at 95 %, of 3.479 that it could have shown "
        "(claimed ≤ 2.001 at δ' = 1e-05): not contradicted"
    ), "a lower bound is rounded down, a claim up"
    said = said.model_copy(update={"audits": (AUDIT, {"method": "of another kind", "seen": 3})})
    for text in (markdown(said), html.unescape(page(said))):
        assert sentence in text
        assert "method of another kind, seen 3" in text
        assert "No audit was made" not in text
    assert "(claimed no bound at" in audit({**AUDIT, "epsilon_claimed": None})
    assert said.as_json()["audits"][0] == AUDIT, "an empty part of an audit stays in it"


def test_a_row_is_called_a_record(said):
    rows = said.model_copy(update={"protected": said.protected.model_copy(update={"unit": "row"})})
    assert "Each record (row) of" in markdown(rows)
    assert "Each record (row) of" in page(rows)


def test_a_run_without_metrics_says_so(books):
    without = said_of(books, metrics={})
    assert without.released.metrics == {}
    assert "Accuracy" not in markdown(without)
    assert "Metrics" not in markdown(without)
    assert "Metrics" not in page(without)


HOSTILE = '"|</td></table><script>alert("x")</script><img src=x onerror=y>\u202e\n# heading'


class Shape(HTMLParser):
    """Every tag of a page, in order, with its attributes' names; one that is not closed in its order is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, [name for name, _ in attrs]))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def with_text(said, text):
    """The statement with `text` wherever one comes from elsewhere."""
    part = said.partitions[0].model_copy(update={"account": text})
    changes = {"run": text, "tuning": text, "partitions": (part,), "audits": ({text: text},), "public_data": text}
    training = said.training.model_copy(update={"labels": (text, "b"), "model": {text: text}})
    protected = said.protected.model_copy(update={"dataset": text, "unit": text})
    return said.model_copy(
        update={**changes, "training": training, "protected": protected, "generated": {text: [text]}}
    )


def test_hostile_texts_stay_texts(said):
    bad, harmless = with_text(said, HOSTILE), with_text(said, "x")
    assert Shape(page(bad)).tags == Shape(page(harmless)).tags
    for text in (page(bad), markdown(bad)):
        assert "<script" not in text
        assert "<img" not in text
        assert "\u202e" not in text
    assert len(markdown(bad).splitlines()) == len(markdown(harmless).splitlines()), "no text makes a line of its own"
    for one, other in zip(markdown(bad).splitlines(), markdown(harmless).splitlines(), strict=True):
        if other.startswith("|"):
            assert one.replace("\\|", "").count("|") == other.count("|"), "nor a cell"
    assert "default-src 'none'" in html.unescape(page(bad))
    assert not re.search(r"https?://|url\(|@import|javascript:", page(bad))


def test_a_text_that_becomes_markup_is_seen(said, monkeypatch):
    monkeypatch.setattr(markup, "_escaped", str)
    with pytest.raises(AssertionError):
        test_hostile_texts_stay_texts(said)


def test_what_is_made_with_a_release_has_its_statement(tmp_path, books, said):
    write_statement(tmp_path, said)
    source = Released(RUN, tmp_path)
    leave(source, tmp_path / "texts.jsonl.statement.json", "generated", {"file": "texts.jsonl", "texts": 3})
    made = read(tmp_path / "texts.jsonl.statement.json", "STATEMENT")
    assert made.generated == {"run": RUN, "file": "texts.jsonl", "texts": 3, "cost": COST}
    assert made.model_copy(update={"generated": None}) == said
    assert "costs nothing" in markdown(made)
    assert prove(made, books).valid


def test_what_is_said_to_be_checked_is_of_this_run(books, tmp_path):
    def how(check, **more):
        (found,) = (one.how for one in said_of(books, **more).checks if one.check == check)
        return found

    public = JOB.with_values({"evaluation": {"on": "public", "source": str(tmp_path / "public.csv")}})
    assert how("what is called public is nobody's secret") == "nothing is"
    assert "no whole source" in how("what is called public is nobody's secret", job=public)
    assert how("what ran is what was reserved").startswith("σ, q, steps")
    assert how("what ran is what was reserved", mode="select").startswith("no candidate costs more")
    assert "how many candidates" not in " ".join(said_of(books).withheld)
    assert "how many candidates" in " ".join(said_of(books, mode="select").withheld)


def test_public_data_is_named_with_its_content(books, tmp_path):
    file = tmp_path / "public.csv"
    file.write_text("age,label\n20,no\n")
    job = JOB.with_values({"evaluation": {"on": "public", "source": str(file)}})
    said = said_of(books, job)
    content = hashlib.sha256(file.read_bytes()).hexdigest()
    assert said.public_data.startswith(f"public.csv (SHA-256 {content}), declared public by the job")
    assert str(tmp_path) not in json.dumps(said.as_json()), "where it lies is nobody's business"
    assert [part.planned is None for part in said.partitions] == [False, True]
    text = markdown(said)
    assert "Metrics: accuracy on public records" in text
    assert "Accuracy 0.765 ± 0.021 (95 % of the chance of which public records were judged)." in text
    assert content in text


def test_a_loss_is_told_as_one(books):
    job = JOB.with_values({"evaluation.metric": "loss"})
    text = markdown(said_of(books, job, metrics={"clipped_loss": 1.5, "clipped_loss_error": 0.25}))
    assert "Metrics: noised clipped loss" in text
    assert "Clipped loss 1.500 ± 0.250 (95 % of the noise)." in text


def test_nothing_hidden_is_in_it(file, said):
    """Neither the ledger's HMAC key nor the partition key: who held them could test guesses about people."""
    with closing(sqlite3.connect(file)) as connection:
        hidden = dict(connection.execute("SELECT name, value FROM secrets"))
    assert {"ledger:hmac", "partition:people"} <= set(hidden)
    for name in ("ledger:hmac", "partition:people"):
        for text in (json.dumps(said.as_json()), markdown(said), page(said)):
            assert hidden[name] not in text


def test_weights_and_statement_are_written_together(tmp_path, said):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    trainer = PrivateTrainer(model, Optimizer(), DPSGDRun(1.0, 1.0, 0.5, 4, 2, 1, 8))
    write_weights(trainer.unhook(), tmp_path)
    assert not (tmp_path / f".{WEIGHTS}").exists()
    release = write_release(tmp_path, tmp_path / WEIGHTS, said)
    written = ["statement.html", "statement.json", "statement.md", WEIGHTS]
    assert sorted(path.name for path in release.iterdir()) == written
    digest = hashlib.sha256((release / WEIGHTS).read_bytes()).hexdigest()
    said = said.model_copy(update={"released": said.released.model_copy(update={"sha256": {WEIGHTS: digest}})})
    assert json.loads((release / "statement.json").read_text()) == said.as_json()
    assert digest in markdown(said)
    assert (release / "statement.md").read_text() == markdown(said)
    assert (release / "statement.html").read_text() == page(said)
    weights = load_file(release / WEIGHTS)
    assert set(weights) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor)


def test_a_statement_holds_no_nan(tmp_path, said):
    (tmp_path / WEIGHTS).write_bytes(b"")
    bad = said.model_copy(update={"released": said.released.model_copy(update={"metrics": {"accuracy": math.nan}})})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_release(tmp_path, tmp_path / WEIGHTS, bad)
