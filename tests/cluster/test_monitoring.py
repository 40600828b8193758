"""The accountant's figures, without Ray: what they say after each act on the books and after a restart, that dashboard
and rules ask for them by their names, and that they tell nothing but what the ledger tells anyone (P5, P13)."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from figures import DASHBOARD, RULES, Registry, failing, named_in

from cluster.accounting.actor import Accountant
from cluster.accounting.books import Books, Dataset
from cluster.accounting.leases import Leases
from cluster.accounting.ledger import Ledger, init
from cluster.accounting.mechanisms import Charge, DiscreteGaussian, PoissonSubsampledGaussian
from cluster.accounting.presence import Presence
from cluster.accounting.schema import entries
from cluster.accounting.verify import SHORT, parse_head
from cluster.errors import PurserError
from cluster.monitoring import FIGURES, GAUGE, LEASES, REACHABLE, SPENT, Figure, Meters, Monitor
from training.jobfile import parse
from tuning.config import SweepJob

STEPS = Charge("d/train", PoissonSubsampledGaussian(0.25, 8.0), 40, 10)
HISTOGRAM = Charge("d/validation", DiscreteGaussian(5.0, 1), 1, 1)
TRAIN = {"account": "d", "partition": "train"}
VALIDATION = {"account": "d", "partition": "validation"}
ALLOWED = {"account", "partition", "status"}


class Desk:
    """An accountant's books and its monitor, over the ledger at `url`; `living` are who show signs of life."""

    def __init__(self, url, living=(), monitor=Monitor):
        self.books = Books(Ledger(url))
        self.living = set(living)
        presence = Presence(self.books.ledger, locked=lambda holder: holder in self.living)
        self.leases = Leases(self.books, presence.is_alive)
        self.registry = Registry()
        self.monitor = monitor(Meters(self.registry), self.books, self.leases, presence)

    def said(self, name, **tags):
        """What is told now."""
        self.monitor.tell()
        return self.registry.said(name, **tags)

    def fill(self):
        """Reserve whole runs until none fits."""
        count = self.books.show("d/train").remaining_cost // self.books.show("d/train").price(STEPS)
        for number in range(count):
            assert self.leases.reserve(f"filler-{number}", "me", [STEPS]).fits
        return count


@pytest.fixture
def url(tmp_path):
    """A ledger with one dataset."""
    url = f"sqlite:///{tmp_path}/ledger.db"
    dataset = Dataset("d", "row", 1000, 1, 0.2, ("source",))
    Books(Ledger(url)).create(dataset, 3.0, 1e-4, {"d/train": [STEPS], "d/validation": [HISTOGRAM]}, 4)
    return url


@pytest.fixture
def desk(url):
    return Desk(url, living=["me"])


def money(desk, tags=TRAIN):
    """(budget, spent, reserved) as they are told."""
    desk.monitor.tell()
    return tuple(desk.registry.said(f"purser_{name}_cost", **tags) for name in ("budget", "spent", "reserved"))


def leases(desk):
    """How many leases of the train account are told to be (open, stale)."""
    desk.monitor.tell()
    return tuple(desk.registry.said("purser_leases", **TRAIN, status=status) for status in ("open", "stale"))


# What is told


def test_the_figures_follow_a_lease_through_its_life(desk):
    budget = desk.books.show("d/train").budget_cost
    price = desk.books.show("d/train").price(STEPS)
    assert money(desk) == (budget, 0, 0)
    assert leases(desk) == (0, 0)

    assert desk.leases.reserve("run", "me", [STEPS, HISTOGRAM]).fits
    assert money(desk) == (budget, 0, price)
    assert leases(desk) == (1, 0)
    assert money(desk, VALIDATION)[2] > 0

    epoch = desk.leases.open("run", "nonce").epoch
    paid = sum(desk.leases.authorise("run", epoch, "d/train", block).cost for block in (1, 2))
    assert money(desk) == (budget, paid, price - paid)
    assert desk.said("purser_authorised_steps_total", **TRAIN) == 20
    assert desk.said("purser_authorised_steps_total", **VALIDATION) is None

    desk.leases.authorise("run", epoch, "d/train", 2)  # a call that is made again charges nothing
    assert desk.said("purser_authorised_steps_total", **TRAIN) == 20

    desk.leases.close("run", "settle", "completed")
    assert money(desk) == (budget, paid, 0)
    assert leases(desk) == (0, 0)


def test_what_was_granted_is_told_as_it_was_declared(desk):
    for tags in (TRAIN, VALIDATION):
        assert desk.said("purser_epsilon", **tags) == 3.0
        assert desk.said("purser_delta", **tags) == 1e-4


def test_refusals_are_counted_once_for_each_lease(desk):
    desk.fill()
    assert desk.said("purser_refusals_total", **TRAIN) is None
    for name in ("late", "later", "late"):
        assert not desk.leases.reserve(name, "me", [STEPS]).fits
    assert desk.said("purser_refusals_total", **TRAIN) == 2
    assert desk.said("purser_refusals_total", **TRAIN) == 2, "nothing new is nothing more"


def test_a_lease_is_stale_while_its_holder_is_silent_and_gone_when_it_is_expired(desk):
    desk.leases.reserve("run", "me", [STEPS, HISTOGRAM])
    assert leases(desk) == (1, 0)
    desk.living.clear()
    assert leases(desk) == (0, 1)
    desk.living.add("me")
    assert leases(desk) == (1, 0), "it was resumed"
    desk.living.clear()
    assert desk.leases.expire_dead() == ["run"]
    assert leases(desk) == (0, 0)
    assert money(desk)[1:] == (0, 0)


def test_a_restart_keeps_what_the_ledger_says_and_begins_counting_anew(desk, url):
    desk.fill()
    epoch = desk.leases.open("filler-0", "nonce").epoch
    desk.leases.authorise("filler-0", epoch, "d/train", 1)
    desk.leases.reserve("late", "me", [STEPS])
    before = money(desk), leases(desk)
    restarted = Desk(url, living=["me"])
    assert (money(restarted), leases(restarted)) == before
    assert restarted.said("purser_authorised_steps_total", **TRAIN) is None
    assert restarted.said("purser_refusals_total", **TRAIN) is None
    restarted.leases.authorise("filler-0", epoch, "d/train", 2)
    restarted.leases.reserve("later", "me", [STEPS])
    assert restarted.said("purser_authorised_steps_total", **TRAIN) == 10
    assert restarted.said("purser_refusals_total", **TRAIN) == 1
    assert desk.said("purser_refusals_total", **TRAIN) == 2, "another accountant sees them, too"


def test_an_account_that_is_made_later_is_told_from_its_first_entry(desk):
    other = [Charge("e/train", STEPS.mechanism, 40, 10), Charge("e/validation", HISTOGRAM.mechanism, 1, 1)]
    desk.books.create(
        Dataset("e", "row", 500, 1, 0.2, ("another source",)), 1.0, 1e-4, {c.account: [c] for c in other}, 1
    )
    desk.leases.reserve("run", "me", other)
    epoch = desk.leases.open("run", "nonce").epoch
    desk.leases.authorise("run", epoch, "e/train", 1)
    assert desk.said("purser_authorised_steps_total", account="e", partition="train") == 10
    assert desk.said("purser_epsilon", account="e", partition="train") == 1.0


# Heads (P5)


def test_the_head_that_is_told_proves_the_chain(desk, url):
    desk.leases.reserve("run", "me", [STEPS])
    seq, number = desk.said("purser_ledger_head", **TRAIN), desk.said("purser_ledger_head_hash", **TRAIN)
    told = parse_head(f"{seq:.0f}:{int(number):0{SHORT}x}")
    assert desk.books.show("d/train").head["hash"].startswith(told[1])
    desk.leases.close("run", "settle", "completed")
    assert desk.books.verify("d/train", told).valid, "what was added since leaves it alone"

    rewritten = Desk(f"{url.removesuffix('ledger.db')}rewritten.db")
    with rewritten.books.ledger._engine.begin() as connection, desk.books.ledger.reading() as view:
        kept = [row for row in view.of_account("d/train") if row["seq"] < told[0]]
        connection.execute(entries.insert(), kept)
    rewritten.leases.reserve("another", "me", [STEPS])
    assert rewritten.books.verify("d/train").valid
    assert rewritten.books.verify("d/train", told).first_bad_seq == told[0]


def test_every_head_is_a_number_that_a_double_holds():
    assert int("f" * SHORT, 16) < 2**53 <= int("f" * (SHORT + 1), 16)


# A ledger in trouble


def test_failed_writes_are_counted(desk, url):
    assert desk.said("purser_ledger_write_failures_total") == 0
    with failing(url):
        for _ in range(2):
            with pytest.raises(PurserError):
                desk.leases.reserve("run", "me", [STEPS])
    assert desk.said("purser_ledger_write_failures_total") == 2
    assert desk.leases.reserve("run", "me", [STEPS]).fits
    with pytest.raises(PurserError):
        desk.leases.authorise("run", 7, "d/train", 1)
    assert desk.said("purser_ledger_write_failures_total") == 2, "a call that is refused is no failure"


def test_an_accountant_that_has_no_ledger_yet_says_so(tmp_path):
    told = told_by(Accountant(f"sqlite:///{tmp_path}/later/ledger.db"))
    assert told() == 0
    (tmp_path / "later").mkdir()
    assert told() == 1


def test_an_accountant_whose_database_goes_away_says_so_and_when_it_is_back(postgresql):
    name = postgresql.create()
    init(postgresql.url(name, "owner"), "service")
    accountant = Accountant(postgresql.url(name))
    told = told_by(accountant)
    try:
        assert told() == 1
        postgresql.stop("immediate")
        try:
            assert told() == 0
        finally:
            postgresql.start()
        assert told() == 1
    finally:
        accountant._books.ledger.close()
        postgresql.drop(name)


def told_by(accountant):
    """Has an accountant look at its ledger; returns whether it says that it can be reached."""
    registry = Registry()
    accountant._meters = Meters(registry)

    def told():
        accountant._tell()
        return registry.said("purser_ledger_reachable")

    return told


def test_every_authorisation_is_timed_those_that_are_not_allowed_too(url):
    registry = Registry()
    accountant = Accountant(url)
    accountant._meters = Meters(registry)
    accountant.reserve("run", "me", [STEPS], None)
    epoch = accountant.open("run", "nonce", 0, 0).epoch
    accountant.authorise("run", epoch, "d/train", 1)
    with pytest.raises(PurserError):
        accountant.authorise("run", epoch + 1, "d/train", 2)
    assert registry.said("purser_authorise_seconds_count") == 2


# What is not told (P13)


def tags_of(text):
    """Every tag in what Prometheus would fetch; `le` is its own."""
    return set(re.findall(r'[{,](\w+)="', text)) - {"le"}


class Gossip(Monitor):
    """Tells who holds what."""

    def _tell(self, account):
        super()._tell(account)
        for hold in self._leases.holds(account.account):
            self._meters.set(LEASES, 1, account="d", partition="train", status=hold.lease)


@pytest.mark.parametrize(("monitor", "leaks"), [(Monitor, False), (Gossip, True)])
def test_no_lease_trial_or_person_is_named(url, monitor, leaks):
    desk = Desk(url, living=["Zyxomma"], monitor=monitor)
    desk.leases.reserve("Zyxomma-lease", "Zyxomma", [STEPS, HISTOGRAM])
    epoch = desk.leases.open("Zyxomma-lease", "Zyxomma-nonce").epoch
    desk.leases.authorise("Zyxomma-lease", epoch, "d/train", 1)
    desk.fill()
    desk.leases.reserve("Zyxomma-refused", "Zyxomma", [STEPS])
    desk.monitor.tell()
    text = desk.registry.text()
    assert "purser_refusals_total{" in text
    assert ("Zyxomma" in text) == leaks
    assert tags_of(text) == ALLOWED


def test_tags_are_of_accounts_partitions_and_states_only():
    assert {tag for figure in FIGURES for tag in figure.tags} == ALLOWED
    with pytest.raises(ValueError, match="[Ll]abel"):
        Meters(Registry()).set(SPENT, 1, **TRAIN, lease="run")


def test_a_selection_tells_nothing_of_how_many_candidates_it_has(desk):
    """One lease, one block, one step, whether K is 0 or 100: nothing is reserved or authorised for a candidate."""
    job = parse(
        SweepJob,
        {
            "account": "d",
            "privacy": {"epsilon": 3.0, "delta": 1e-4, "unit": "row", "units": 1000},
            "data": {"source": "sklearn:digits"},
            "model": {"kind": "linear"},
            "training": {"steps": 5, "expected_batch_size": 200, "noise_multiplier": 20.0},
            "evaluation": {"noise": 50.0},
            "tuning": {"mode": "select", "trials": 4},
        },
    )
    charges = job.selection(desk.books.show("d/train").order)
    assert desk.leases.reserve("selection", "me", charges).fits
    assert leases(desk) == (1, 0)
    epoch = desk.leases.open("selection", "nonce").epoch
    for _ in range(3):  # each worker group asks for the same block, however many candidates it takes
        for charge in charges:
            desk.leases.authorise("selection", epoch, charge.account, 1)
    assert desk.said("purser_authorised_steps_total", **TRAIN) == 1
    assert desk.said("purser_authorised_steps_total", **VALIDATION) == 1
    assert leases(desk) == (0, 0)


# Names


def misspelt(text):
    """Figures that `text` asks for and nobody tells."""
    return named_in(text) - {name for figure in FIGURES for name in figure.exported}


def unasked(text):
    """Figures that are told, and that `text` does not ask for."""
    return {figure.name for figure in FIGURES if not set(figure.exported) & named_in(text)}


def test_dashboard_and_rules_ask_for_what_is_told():
    dashboard, rules = DASHBOARD.read_text(encoding="utf-8"), RULES.read_text(encoding="utf-8")
    assert misspelt(dashboard) == misspelt(rules) == set()
    assert unasked(dashboard) == set()


@pytest.mark.parametrize("file", [DASHBOARD, RULES], ids=["dashboard", "rules"])
def test_each_name_is_caught_when_it_is_misspelt_or_left_out(file):
    text = file.read_text(encoding="utf-8")
    for name in named_in(text):
        assert misspelt(text.replace(name, name[:-1]))
    if file is DASHBOARD:
        for figure in FIGURES:
            assert unasked(re.sub(rf"\bray_{figure.name}(_total|_bucket)?\b", "up", text)) == {figure.name}


def test_names_are_ours_and_leave_the_endings_to_ray():
    assert len({figure.name for figure in FIGURES}) == len(FIGURES)
    for figure in FIGURES:
        assert re.fullmatch(r"purser_[a-z_]+", figure.name)
        assert not figure.name.endswith(("_total", "_bucket", "_sum", "_count"))
        assert figure.says


def test_ray_takes_every_figure():
    """Its own classes, which outside of a Ray process record nothing."""
    meters = Meters()
    meters.set(REACHABLE, 1)
    with pytest.raises(ValueError, match="Missing"):
        meters.set(SPENT, 1, account="d")
    with pytest.warns(UserWarning, match="discarded"):
        Figure(GAUGE, "purser-spent", (), "a name that Prometheus does not know").made_by(
            __import__("ray.util.metrics", fromlist=["Gauge"])
        )


# The dashboard as Grafana reads it


def test_panels_are_whole_and_do_not_lie_on_each_other():
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in (panel for panel in panels if panel["type"] != "row"):
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["type"] == "table" or panel["fieldConfig"]["defaults"].get("unit") or panel["type"] == "stat"
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables | {"__rate_interval"}
            assert 'SessionName=~"$SessionName"' in target["expr"]


def test_every_alert_says_what_happened_and_what_to_do():
    (group,) = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "description"}
        assert len(rule["annotations"]["description"]) > len(rule["annotations"]["summary"])
