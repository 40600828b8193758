"""A job is let in when its data and its facts are the account's (P4); nothing of the data but its HMAC goes into the
books (P13), and nothing is charged."""

from __future__ import annotations

import json

import pytest

from cluster.accounting.books import Books
from cluster.accounting.ledger import Ledger
from cluster.errors import UsageError
from training.admission import admit, plans_of
from training.config import Job, parse

SECRET = "Ada-Lovelace-HIV"
ROWS = f"age,person,label\n36,{SECRET},yes\n41,Babbage,no\n"


@pytest.fixture
def books(tmp_path):
    return Books(Ledger(f"sqlite:///{tmp_path}/ledger.db"))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "people.csv"
    path.write_text(ROWS)
    return path


def job_of(source, **changes):
    raw = {
        "account": "people",
        "privacy": {"epsilon": 3.0, "delta": 1e-4, "unit": "person", "units": 2000, "max_records_per_unit": 2},
        "data": {
            "source": str(source),
            "features": {"age": {"range": [0, 120]}},
            "label": {"column": "label", "categories": ["no", "yes"]},
        },
        "model": {"kind": "linear"},
    }
    return parse(Job, raw).with_values({key.replace("__", "."): value for key, value in changes.items()})


def let_in(books, job):
    return admit(books, job, plans_of([job.charges()]), 8)


def entries(books):
    return [row for name in books.names() for row in books.history(name)]


def test_accounts_are_made_once_from_the_job(books, source):
    made, new = let_in(books, job_of(source))
    again, old = let_in(books, job_of(source, training__noise_multiplier=20.0))
    assert (new, old) == (True, False)
    assert again == made
    assert [account.account for account in made] == ["people/train", "people/validation"]
    assert {row["kind"] for row in entries(books)} == {"account", "source"}
    assert all(row["cost"] == 0 for row in entries(books))


def test_only_an_hmac_of_the_data_goes_into_the_books(books, source):
    let_in(books, job_of(source))
    said = json.dumps(entries(books))
    for word in (SECRET, "Babbage", "36", "41"):
        assert f'"{word}"' not in said
    assert SECRET not in said
    (hmac,) = books.show("people/train").dataset.sources
    assert len(bytes.fromhex(hmac)) == 32


@pytest.mark.parametrize("content", [ROWS + "50,Byron,no\n", ROWS.replace("36", "37"), ROWS.replace("yes", "no")])
def test_other_content_is_refused(books, source, content):
    """An account is bound to its data: one cell is enough (P4)."""
    let_in(books, job_of(source))
    before = entries(books)
    source.write_text(content)
    with pytest.raises(UsageError, match=r"^data\.source: ") as raised:
        let_in(books, job_of(source))
    assert SECRET not in str(raised.value)
    assert entries(books) == before


def test_the_same_content_in_another_order_or_place_is_the_same_data(books, source, tmp_path):
    let_in(books, job_of(source))
    header, *rows = ROWS.splitlines()
    (tmp_path / "moved.csv").write_text("\n".join([header, *rows[::-1]]) + "\n")
    assert let_in(books, job_of(tmp_path / "moved.csv"))[1] is False


def test_the_same_content_gets_no_second_budget(books, source):
    let_in(books, job_of(source))
    with pytest.raises(UsageError, match=r"^data\.source: .*already belongs to the dataset people"):
        let_in(books, job_of(source, account="others"))
    assert not books.exists("others")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("privacy.epsilon", 3.1),
        ("privacy.delta", 1e-5),
        ("privacy.units", 2001),
        ("privacy.unit", "age"),
        ("privacy.max_records_per_unit", 1),
        ("data.validation_fraction", 0.3),
    ],
)
def test_other_facts_are_refused(books, source, field, value):
    let_in(books, job_of(source))
    with pytest.raises(UsageError, match=rf"^{field.replace('.', '[.]')}: the job says {value}"):
        let_in(books, job_of(source).with_values({field: value}))


def test_a_source_that_is_no_table_makes_no_account(books, source):
    source.write_text(ROWS + f"1,2,3,{SECRET}\n")
    with pytest.raises(UsageError, match=r"^data\.source: ") as raised:
        let_in(books, job_of(source))
    assert SECRET not in str(raised.value)
    assert books.names() == []


def test_a_unit_that_is_no_column_makes_no_account(books, source):
    with pytest.raises(UsageError, match=r"^privacy\.unit: "):
        let_in(books, job_of(source, privacy__unit="persom"))
    assert books.names() == []


def test_plans_are_the_different_charges_of_each_account(source):
    cheap, dear = job_of(source, training__noise_multiplier=20.0), job_of(source, training__noise_multiplier=4.0)
    plans = plans_of([job.charges() for job in (cheap, dear, cheap)])
    assert plans == {
        "people/train": [cheap.charges()[0], dear.charges()[0]],
        "people/validation": [cheap.charges()[1]],
    }
