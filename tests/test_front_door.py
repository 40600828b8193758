"""The command line without Ray: the contract's keys, and bad input that ends in one sentence with nothing charged
(P4, P11). Every command runs for real, in a process of its own; many bad inputs end in this one."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from product import DIGITS

from cluster.accounting.ledger import Ledger

PLAN_KEYS = {
    "account", "epsilon", "delta", "order", "mode", "trial_cost", "trials_that_fit", "filter_epsilon",
    "select_epsilon", "select_trials_p99",
}  # fmt: skip
SHOW_KEYS = {
    "account", "epsilon", "delta", "order", "budget_cost", "spent_cost", "reserved_cost", "remaining_cost", "head",
}  # fmt: skip
HISTORY_KEYS = {"seq", "kind", "key", "mechanism", "steps", "cost", "at", "by", "prev_hash", "hash"}


def one_sentence(ended, code, *words):
    """The command failed with `code`, said one line on stderr that holds `words`, and printed no traceback."""
    assert ended.code == code, (ended.out, ended.err)
    assert "Traceback" not in ended.out + ended.err
    said = [line for line in ended.err.splitlines() if line.startswith("purser: ")]
    assert len(said) == 1, ended.err
    for word in words:
        assert word in said[0], said[0]


def charged(purser):
    """What all accounts of the ledger have spent and reserved, and how many entries there are beside refusals."""
    if not (purser.home / "ledger.db").exists():
        return 0
    ledger = Ledger(f"sqlite:///{purser.home / 'ledger.db'}")
    with ledger.reading() as view:
        rows = [row for account in view.accounts() for row in view.of_account(account)]
    return sum(row["kind"] not in ("account", "source", "refuse") for row in rows)


def test_the_contract_of_plan_and_budget(purser):
    planned = purser("plan", DIGITS, "--json")
    assert planned.code == 0
    assert set(planned.json) >= PLAN_KEYS
    assert planned.json["account"] == "digits"
    assert planned.json["order"] == 6
    assert len(planned.out.strip().splitlines()) == 1, "--json keeps stdout clean"
    assert json.loads(purser.here("budget", "list", "--json").out) == {"accounts": []}, "a plan makes no account"

    made = purser("budget", "create", DIGITS)
    assert made.code == 0
    assert "digits/train: order 6" in made.out
    assert [a["account"] for a in purser("budget", "list", "--json").json["accounts"]] == [
        "digits/train",
        "digits/validation",
    ]
    shown = purser("budget", "show", "digits/validation", "--json").json
    assert set(shown) >= SHOW_KEYS
    assert shown["account"] == "digits/validation"
    assert shown["remaining_cost"] == shown["budget_cost"] > 0
    assert shown["spent_cost"] == shown["reserved_cost"] == 0
    entries = purser("budget", "history", "digits/train", "--json").json["entries"]
    assert set(entries[0]) >= HISTORY_KEYS
    assert entries[1]["prev_hash"] == entries[0]["hash"]
    head = purser.here("budget", "show", "digits", "--json").json["head"]
    verified = purser("budget", "verify", "digits/train", "--head", f"{head['seq']}:{head['hash']}", "--json")
    assert verified.code == 0
    assert verified.json["valid"] is True
    assert verified.json["first_bad_seq"] is None
    assert verified.json["head"] == head
    forged = purser("budget", "verify", "digits/train", "--head", f"{head['seq']}:{'0' * 64}")
    assert forged.code == 1
    assert "Traceback" not in forged.err
    one_sentence(purser.here("budget", "create", DIGITS), 2, "digits/train exists already")


IRIS = Path(find_spec("sklearn").origin).parent / "datasets" / "data" / "iris.csv"
BAD = {
    "an unknown key": (["training.noise_multipler=8"], ["training.noise_multipler", "noise_multiplier?"]),
    "an unknown section": (["trainin.steps=8"], ["trainin", "unknown"]),
    "NaN": (["training.noise_multiplier=.nan"], ["training.noise_multiplier", "nan"]),
    "infinite": (["training.noise_multiplier=.inf"], ["training.noise_multiplier", "inf"]),
    "negative": (["training.noise_multiplier=-1"], ["training.noise_multiplier", "-1"]),
    "zero clip": (["training.max_grad_norm=0"], ["training.max_grad_norm"]),
    "NaN in the space": (["tuning.space={training.noise_multiplier: {choice: [8.0, .nan]}}"], ["noise_multiplier"]),
    "negative in the space": (["tuning.space={training.noise_multiplier: {choice: [-8.0]}}"], ["noise_multiplier"]),
    "no steps": (["training.steps=0"], ["training.steps"]),
    "delta too large": (["privacy.delta=1e-3"], ["privacy.delta", "1/units"]),
    "batch larger than the data": (["training.expected_batch_size=1500"], ["training.expected_batch_size", "1438"]),
    "no file": (["data.source=absent.csv"], ["data.source", "absent.csv"]),
    "no table": ([f"data.source={DIGITS}"], ["data.source", "no file of a known format"]),
    "no column features": ([f"data.source={IRIS}"], ["data.features"]),
    "a cnn without its image": (["model.kind=cnn", "model.image=[1, 3, 3]"], ["model.image"]),
    "a selection that learns": (["tuning.mode=select", "tuning.search=optuna"], ["tuning.search", "random"]),
    "a selection that halves": (["tuning.mode=select", "tuning.scheduler=asha"], ["tuning.scheduler", "none"]),
    "an override without =": (["training.steps"], ["override", "section.key=value"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_to_tune_ends_in_a_sentence_with_nothing_charged(purser, case):
    overrides, words = BAD[case]
    one_sentence(purser.here("tune", DIGITS, *overrides), 2, *words)
    assert charged(purser) == 0


def test_a_missing_or_broken_job_file(purser):
    one_sentence(purser("tune", "absent.yaml"), 2, "JOB", "absent.yaml", "does not exist")
    (purser.folder / "broken.yaml").write_text("account: [")
    one_sentence(purser("plan", "broken.yaml"), 2, "JOB", "not YAML")
    one_sentence(purser.here("train"), 2, "JOB")
    one_sentence(purser("train", "--resume", "../../etc"), 2, "RUN")
    one_sentence(purser.here("train", "--resume", "never-was"), 2, "RUN")
    nobody = purser("budget", "show", "nobody")
    one_sentence(nobody, 2, "ACCOUNT", "nobody")
    assert purser.here("budget", "show", "nobody") == nobody, "in this process as in one of its own"
    one_sentence(purser("frobnicate"), 2, "frobnicate")
    one_sentence(purser.here("plan", DIGITS, PURSER_LEDGER="mysql://x/y"), 2, "PURSER_LEDGER")


def table(folder, name, rows):
    """A small table of the user's and a job over it."""
    (folder / f"{name}.csv").write_text("age,income\n" + "".join(f"{a},{b}\n" for a, b in rows))
    job = {
        "account": name,
        "privacy": {"epsilon": 2.0, "delta": 1e-4, "units": 200},
        "data": {
            "source": f"{name}.csv",
            "features": {"age": {"range": [17, 90]}},
            "label": {"column": "income", "categories": ["low", "high"]},
        },
        "model": {"kind": "linear"},
        "training": {"expected_batch_size": 64, "steps": 20},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(job))
    return folder / f"{name}.yaml"


def test_an_account_is_bound_to_its_data_and_its_grant(purser):
    rows = [(20 + i % 50, "high" if i % 3 else "low") for i in range(200)]
    job = table(purser.folder, "people", rows)
    assert purser.here("budget", "create", job).code == 0

    one_sentence(purser.here("train", job, "privacy.epsilon=4"), 2, "privacy.epsilon", "4", "2")
    one_sentence(purser("tune", job, "privacy.delta=1e-5"), 2, "privacy.delta")
    one_sentence(purser.here("train", job, "privacy.units=190"), 2, "privacy.units")
    one_sentence(purser.here("train", job, "data.validation_fraction=0.3"), 2, "data.validation_fraction")

    other = table(purser.folder, "others", rows[::-1])
    one_sentence(purser.here("train", other), 2, "data.source", "people")  # the same records in another order and file
    table(purser.folder, "people", [*rows, (33, "low")])
    one_sentence(purser.here("train", job), 2, "data.source", "people")
    assert charged(purser) == 0


def test_a_run_that_cannot_be_paid_for_is_refused_before_ray_starts(purser):
    ended = purser("train", DIGITS, "training.noise_multiplier=1.0", "--json")
    one_sentence(ended, 3, "refused", "digits/train", "What would fit", "training.noise_multiplier=")
    assert ended.json["status"] == "refused"
    assert ended.json["authorised_steps"] == 0
    assert charged(purser) == 0
    kinds = [e["kind"] for e in purser.here("budget", "history", "digits/train", "--json").json["entries"]]
    assert kinds == ["account", "source", "refuse"]


def test_rehearsal_needs_no_ray_and_charges_nothing(purser):
    ended = purser("train", "--rehearse", DIGITS, "model.kind=cnn", "--json")
    assert ended.code == 0, ended.err
    assert 0.99 < ended.json["rehearsal"]["largest_norm"] <= 1.00001
    assert charged(purser) == 0


def test_accountant_init_makes_a_ledger_once(purser):
    made = purser("accountant", "init", "--json")
    assert made.code == 0
    assert set(made.json) == {"protocol", "ledger", "accounts"}
    assert made.json["accounts"] == []
    again = purser.here("accountant", "init", "--json")
    assert again.json == made.json, "the same ledger, not another"
    one_sentence(purser("accountant", "init", "--service", "trainer"), 2, "--service", "SQLite")


def test_show_says_who_holds_what_in_json_too(purser):
    assert purser.here("budget", "create", DIGITS).code == 0
    shown = purser.here("budget", "show", "digits", "--json")
    assert shown.json["reserved_by"] == []
    assert {"account", "order", "budget_cost", "spent_cost", "reserved_cost", "remaining_cost", "head"} <= set(
        shown.json
    )
