"""A real Prometheus over a real Ray: what the accountant's actor tells arrives exactly, every panel of the dashboard
finds its series, alerts fire, a restart shows in no figure of the ledger's, an accountant that is gone is missed."""

from __future__ import annotations

import json
import re
import time

import pytest
import yaml
from actors import end_accountant
from figures import DASHBOARD, RULES, failing
from prometheus import Prometheus

from cluster.accounting.actor import start
from cluster.accounting.books import Books, Dataset
from cluster.accounting.ledger import Ledger
from cluster.accounting.mechanisms import Charge, DiscreteGaussian, PoissonSubsampledGaussian
from cluster.accounting.verify import SHORT, parse_head
from cluster.environment import ACCOUNTANT, NAMESPACE
from cluster.errors import PurserError
from cluster.monitoring import FIGURES

pytestmark = pytest.mark.cluster

STEP = PoissonSubsampledGaussian(0.25, 8.0)
HISTOGRAM = Charge("d/validation", DiscreteGaussian(5.0, 1), 1, 1)
SECRET = "Zyxomma"  # in the name of every lease and holder
VARIABLES = {"SessionName": ".+", "Account": ".+", "Cluster": ".*", "__rate_interval": "1m"}
RAYS = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "instance", "job"}
DASHES = json.loads(DASHBOARD.read_text(encoding="utf-8"))
QUERIES = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHES["panels"]
    for target in panel.get("targets", ())
}
ALERTS = {rule["alert"]: rule for rule in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"][0]["rules"]}


def training(steps):
    return Charge("d/train", STEP, steps, steps)


def eventually(act):
    """Wait until `act` holds: Ray exports every ten seconds."""
    deadline = time.monotonic() + 90
    while not act():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.5)


def of_train(name):
    return f'max by (account, partition) (ray_purser_{name}{{account="d", partition="train"}})'


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """A ledger with one dataset."""
    books = Books(Ledger(f"sqlite:///{tmp_path_factory.mktemp('books')}/ledger.db"))
    dataset = Dataset("d", "row", 1000, 1, 0.2, ("source",))
    books.create(dataset, 3.0, 1e-4, {"d/train": [training(40)], "d/validation": [HISTOGRAM]}, 4)
    return books


@pytest.fixture(scope="module")
def accountant(books, ray_session):
    """Its client, after one refusal, one failed write, and 85 % of the budget spent by a lease whose holder is gone."""
    client = start(books.ledger.url)
    account = books.show("d/train")
    steps = next(n for n in range(1, 10**6) if account.price(training(n)) > 0.85 * account.budget_cost)
    assert not client.reserve(f"{SECRET}-refused", SECRET, [training(2 * steps)]).fits
    with failing(books.ledger.url), pytest.raises(PurserError):
        client.reserve(f"{SECRET}-run", SECRET, [training(steps)])
    assert client.reserve(f"{SECRET}-run", SECRET, [training(steps), HISTOGRAM]).fits
    epoch = client.open(f"{SECRET}-run", f"{SECRET}-nonce", 0).epoch
    assert client.authorise(f"{SECRET}-run", epoch, "d/train", 1).stop == steps
    yield client
    end_accountant()


@pytest.fixture(scope="module")
def prometheus(accountant, ray_session, tmp_path_factory):
    """Scrapes this Ray and has our rules, their patience cut to a second."""
    folder = tmp_path_factory.mktemp("prometheus")
    hasty = [rule | ({"for": "1s"} if "for" in rule else {}) for rule in ALERTS.values()]
    rules = folder / "rules.yml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "purser", "rules": hasty}]}), encoding="utf-8")
    targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray_session.nodes()]
    server = Prometheus(folder, targets, rules)
    try:
        # Of accountants before ours, in the same Ray, Prometheus hears for half a minute more.
        eventually(lambda: len(server.series('ray_purser_ledger_head{account="d", partition="train"}')) == 1)
        eventually(lambda: server.value(of_train("spent_cost")) and len(server.series("ray_purser_refusals_total")))
        yield server
    finally:
        server.end()


def substituted(text):
    """`text` as Grafana sends it, with every variable at All."""
    return re.sub(r"\$(\w+)", lambda found: VARIABLES[found[1]], text)


def test_what_arrives_is_what_the_ledger_says(prometheus, books):
    account = books.show("d/train")
    assert prometheus.value(of_train("epsilon")) == 3.0
    for name in ("budget_cost", "spent_cost", "reserved_cost"):
        assert prometheus.value(of_train(name)) == getattr(account, name)
    assert account.spent_cost > 0.85 * account.budget_cost
    validation = 'max (ray_purser_reserved_cost{account="d", partition="validation"})'
    assert prometheus.value(validation) == books.show("d/validation").reserved_cost > 0
    assert prometheus.value("max (ray_purser_ledger_reachable)") == 1


def test_a_head_that_prometheus_kept_proves_the_chain(prometheus, books):
    seq, number = prometheus.value(of_train("ledger_head")), prometheus.value(of_train("ledger_head_hash"))
    head = parse_head(f"{seq:.0f}:{int(number):0{SHORT}X}")
    assert books.show("d/train").head["hash"].startswith(head[1])
    assert books.verify("d/train", head).valid
    assert not books.verify("d/train", (head[0], "0" * SHORT)).valid


@pytest.mark.parametrize("panel", QUERIES)
def test_every_query_of_every_panel_finds_series(prometheus, panel):
    query = substituted(QUERIES[panel])
    eventually(lambda: prometheus.series(query))  # a rate has need of two samples
    for name in set(re.findall(r"ray_purser_\w+", query)):
        assert not prometheus.series(query.replace(name, f"{name}s")), "a misspelt one finds none"


def test_every_choice_that_the_dashboard_offers_is_found(prometheus):
    for variable in DASHES["templating"]["list"]:
        if variable["type"] == "query":
            match, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"]).groups()
            values = prometheus.ask(f"label/{label}/values", **{"match[]": substituted(match)})
            assert values or label == "ray_io_cluster", f"{label}: none"  # KubeRay's PodMonitor sets that one


def test_alerts_fire_on_what_happened_and_on_nothing_else(prometheus):
    for rule in ALERTS.values():
        prometheus.series(rule["expr"])
    assert prometheus.series("ray_node_cpu_count"), "by which a rule knows that a cluster lives"
    happened = {"PurserBudget80", "PurserRefused", "PurserLedgerWriteFailures", "PurserStaleLease"}
    eventually(lambda: prometheus.alerts() == dict.fromkeys(happened, "firing"))


def test_every_figure_arrives_and_names_no_lease_trial_or_person(prometheus):
    told = prometheus.ask("series", **{"match[]": '{__name__=~"ray_purser_.+"}'})
    assert {one["__name__"] for one in told} == {name for figure in FIGURES for name in figure.exported}
    assert SECRET not in json.dumps(told)
    tags = {tag for one in told for tag in one if not tag.startswith(("__", "otel_"))}
    assert tags == RAYS | {"account", "partition", "status", "le"}


def test_a_restart_shows_in_no_figure_of_the_ledger_s(prometheus, accountant, books, ray_session):
    def workers():
        return {labels["WorkerId"] for labels, _ in prometheus.series("ray_purser_ledger_reachable")}

    before = workers()
    ray_session.kill(ray_session.get_actor(ACCOUNTANT, namespace=NAMESPACE), no_restart=False)
    eventually(lambda: workers() and not workers() & before)  # nobody called it: it tells by itself
    assert prometheus.value(of_train("spent_cost")) == books.show("d/train").spent_cost
    assert prometheus.value('sum (ray_purser_refusals_total{account="d"})') == 1
    assert "PurserAccountantAbsent" not in prometheus.alerts()


def test_an_accountant_that_is_gone_is_missed(prometheus, accountant):
    assert not prometheus.series("absent(ray_purser_ledger_reachable)")
    end_accountant()
    eventually(lambda: prometheus.alerts().get("PurserAccountantAbsent") == "firing")
