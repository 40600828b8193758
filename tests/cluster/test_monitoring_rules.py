"""The alerts, by Prometheus' own tool: each fires and stays quiet where `rules_test.yml` says, and a rule that is
broken on purpose is found by that."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import yaml
from figures import RULES
from prometheus import tool

TESTS = RULES.with_name("rules_test.yml")
RULE = {rule["alert"]: rule for rule in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"][0]["rules"]}


@pytest.fixture
def promtool(tmp_path):
    """Runs the rules' tests on a copy of the rules; returns whether they pass."""
    binary = tool("promtool")
    shutil.copy(TESTS, tmp_path)

    def passes(rules):
        (tmp_path / RULES.name).write_text(rules, encoding="utf-8")
        tested = subprocess.run([binary, "test", "rules", TESTS.name], cwd=tmp_path, capture_output=True, text=True)
        assert tested.returncode == 0 or "exp:" in tested.stderr, tested.stderr
        return tested.returncode == 0

    return passes


def test_the_rules_do_what_their_tests_say(promtool):
    subprocess.run([tool("promtool"), "check", "rules", str(RULES)], check=True, capture_output=True)
    assert promtool(RULES.read_text(encoding="utf-8"))
    assert promtool(changed(None)), "to write them anew breaks nothing"


def test_each_alert_is_seen_to_fire_and_to_stay_quiet():
    seen = {(one["alertname"], bool(one["exp_alerts"])) for test in cases() for one in test["alert_rule_test"]}
    assert seen == {(alert, fires) for alert in RULE for fires in (True, False)}


def cases():
    return yaml.safe_load(TESTS.read_text(encoding="utf-8"))["tests"]


def changed(alert, **changes):
    """The rules, with one of them changed."""
    rules = [{**rule, **changes} if name == alert else rule for name, rule in RULE.items()]
    return yaml.safe_dump({"groups": [{"name": "purser", "rules": rules}]})


@pytest.mark.parametrize(
    ("alert", "right", "wrong"),
    [
        ("PurserBudget80", ">= 0.8", "> 0.8"),
        ("PurserBudget80", " < 0.95", ""),
        ("PurserBudget95", ">= 0.95", ">= 0.94"),
        ("PurserRefused", "unless ray_purser_refusals_total offset 15m", "> 1"),
        ("PurserRefused", "increase(ray_purser_refusals_total[15m])", "ray_purser_refusals_total"),
        ("PurserAccountantAbsent", "absent(ray_purser_ledger_reachable)", "vector(0) > 1"),
        ("PurserAccountantAbsent", "unless on (SessionName)", "unless on ()"),
        ("PurserAccountantAbsent", "(ray_node_cpu_count)", "(last_over_time(ray_node_cpu_count[1d]))"),
        ("PurserLedgerUnreachable", "== 0", "== 1"),
        ("PurserLedgerWriteFailures", "[15m]", "[2h]"),
        ("PurserLedgerWriteFailures", "unless ray_purser_ledger_write_failures_total offset 15m", "> 1"),
        ("PurserStaleLease", 'status="stale"', 'status="open"'),
    ],
)
def test_a_broken_rule_is_caught(promtool, alert, right, wrong):
    assert right in RULE[alert]["expr"]
    assert not promtool(changed(alert, expr=RULE[alert]["expr"].replace(right, wrong)))


@pytest.mark.parametrize("alert", [name for name, rule in RULE.items() if "for" in rule])
def test_patience_is_tested(promtool, alert):
    assert not promtool(changed(alert, **{"for": "0s"}))
