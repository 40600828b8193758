"""A job is let in when its data and its facts are the account's (P4); nothing of the data but its HMAC goes into the
books (P13), and nothing is charged."""

from __future__ import annotations

import json

import pytest

from cluster.accounting.books import Books
from cluster.accounting.ledger import Ledger
from cluster.errors import UsageError
from training.admission import admit, plans_of, source_of
from training.config import Job
from training.jobfile import parse
from tuning.config import SweepJob
from tuning.plan import planned

SECRET = "Ada-Lovelace-HIV"
ROWS = f"age,person,label\n36,{SECRET},yes\n41,Babbage,no\n"


@pytest.fixture
def books(home, tmp_path):
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


def judged_on(file, source, **changes):
    return job_of(source, evaluation={"on": "public", "source": str(file)}, **changes)


@pytest.fixture
def public(tmp_path):
    path = tmp_path / "public.csv"
    path.write_text("age,label\n20,no\n30,yes\n")
    return path


def test_a_job_may_be_judged_on_a_public_file_without_units(books, source, public):
    job = judged_on(public, source)
    accounts, _ = admit(books, job, planned(SweepJob(**dict(job))), 8)
    assert [account.account for account in accounts] == ["people/train", "people/validation"]
    assert [row["kind"] for row in entries(books)].count("source") == 1, "what is public has no account"


@pytest.mark.parametrize("content", [ROWS, "\n".join([*ROWS.splitlines()[:1], *ROWS.splitlines()[:0:-1]]) + "\n"])
def test_what_is_private_is_not_declared_public(books, source, public, content):
    """The job's own source under another name, in another order; and another dataset's."""
    public.write_text(content)
    with pytest.raises(UsageError, match=r"^evaluation\.source: .*so it is not public"):
        let_in(books, judged_on(public, source))
    assert not books.exists("people")
    let_in(books, job_of(source))
    other = source.with_name("others.csv")
    other.write_text(ROWS + "50,Byron,no\n")
    with pytest.raises(UsageError, match=r"^evaluation\.source: .*so it is not public"):
        let_in(books, judged_on(public, other, account="others"))


def test_a_subset_of_what_is_private_cannot_be_told_from_other_records(books, source, public):
    """An answer about single records would be an oracle of who is in the data: only the whole is compared."""
    public.write_text("".join(f"{line}\n" for line in ROWS.splitlines()[:2]))
    assert source_of(books, judged_on(public, source)) == source_of(books, job_of(source))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"evaluation\.source: .* does not exist"),
        ("", r"evaluation\.source: public\.csv cannot be used"),
        (f"age,label\n1,2,{SECRET}\n", r"evaluation\.source: public\.csv cannot be used"),
        ("age,label\n", r"evaluation\.source: public\.csv holds no records"),
        ("age,name\n1,x\n", r"data\.label\.column: evaluation\.source has no column 'label'"),
        ("label\nyes\n", r"data\.features\.age: evaluation\.source has no column 'age'"),
    ],
)
def test_a_public_file_that_cannot_be_used_is_found_before_anything_is_charged(books, source, public, content, said):
    public.unlink()
    if content is not None:
        public.write_text(content)
    with pytest.raises(UsageError, match=f"^{said}") as raised:
        let_in(books, judged_on(public, source))
    assert SECRET not in str(raised.value)
    assert not books.exists("people")


def test_groups_are_looked_for_where_models_are_judged(books, source, public):
    job = judged_on(public, source)
    with_groups = job.with_values({"evaluation.groups": {"column": "person", "categories": ["Babbage"]}})
    with pytest.raises(UsageError, match=r"^evaluation\.groups\.column: evaluation\.source has no column 'person'"):
        source_of(books, with_groups)
    on_private = job_of(source, evaluation__groups={"column": "person", "categories": ["Babbage"]})
    assert source_of(books, on_private) == source_of(books, job)
