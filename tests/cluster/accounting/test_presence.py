"""Who lives among the holders of leases: nobody is given up for dead before the full grace has passed without a sign of
life, wherever the sign was given, and the dead are found (P3). The clock is the test's own."""

from __future__ import annotations

import functools
import json
import threading
import time

import pytest
from bookkeeping import TRAIN, VALIDATION, evaluation, fill, run_attempt, training
from crashes import outcome
from places import SqlitePlaces

from cluster.accounting import presence as presence_module
from cluster.accounting.leases import Leases
from cluster.accounting.presence import BEAT, GRACE, LAPSE, Presence
from cluster.environment import HOME, LEDGER, Alive, is_alive
from cluster.errors import PurserError, Unreachable


class Clock:
    """Seconds, as the test tells them."""

    def __init__(self):
        self.now = 5000.0

    def __call__(self):
        return self.now


def nobody_here(_holder):
    """No process of this machine holds a lock file: holders are elsewhere."""
    return False


class Post:
    """One accountant's view of who lives, on a ledger that it opened itself."""

    def __init__(self, place, clock, kind=Presence):
        self.desk = place.desk()
        self.presence = kind(self.desk.ledger, locked=nobody_here, clock=clock)
        self.leases = Leases(self.desk.books, self.presence.is_alive)
        self.beat, self.is_alive = self.presence.beat, self.presence.is_alive

    def die(self):
        """Its process ends, and with it its sessions of the database."""
        self.presence._beacons.invalidate()
        self.presence._beacons.close()
        self.desk.ledger.close()


@pytest.fixture(scope="module")
def database():
    """Where accountants share a ledger."""
    return "postgresql"


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def post(place, clock):
    return Post(place, clock)


@pytest.fixture
def other(place, clock):
    """Another accountant on the same database: of another cluster, or of this one after a restart."""
    return Post(place, clock)


def pass_time(clock, seconds, *each_beat):
    """Let time go by in steps of a heartbeat, doing `each_beat` at every one."""
    end = clock.now + seconds
    while clock.now < end:
        clock.now = min(end, clock.now + BEAT)
        for act in each_beat:
            act()


# Grace


def test_an_accountant_that_begins_grants_everybody_the_full_grace(post, clock):
    """It knows nothing of who sent heartbeats to the one before it."""
    assert post.is_alive("holder")
    pass_time(clock, GRACE - 1, lambda: post.is_alive("holder"))
    assert post.is_alive("holder"), "to ask does not shorten it"
    clock.now += 1
    assert not post.is_alive("holder")
    assert not post.is_alive("holder"), "and does not lengthen it"


def test_grace_begins_for_each_when_it_was_first_missed(post, clock):
    assert post.is_alive("first")
    clock.now += GRACE / 2
    assert post.is_alive("second")
    clock.now += GRACE / 2
    assert not post.is_alive("first")
    assert post.is_alive("second")


def test_heartbeats_keep_alive_for_ever_and_their_end_is_found(post, clock):
    pass_time(clock, 20 * GRACE, lambda: post.beat("holder"), lambda: post.is_alive("holder"))
    last = clock.now
    while post.is_alive("holder"):
        assert clock.now - last < LAPSE + GRACE + BEAT
        clock.now += 1
    assert clock.now - last >= GRACE


def test_one_late_heartbeat_is_enough(post, clock):
    for _ in range(5):
        post.beat("holder")
        pass_time(clock, LAPSE + GRACE - 1, lambda: post.is_alive("holder"))
        assert post.is_alive("holder")


def test_silence_is_counted_from_the_last_sign_of_life(post, clock):
    """It was asked about once, long ago, before its first heartbeat; since then it has sent one every ten seconds."""
    assert post.is_alive("holder")
    pass_time(clock, 5 * GRACE, lambda: post.beat("holder"))
    last = clock.now
    clock.now += LAPSE + 1
    assert post.is_alive("holder"), "after 41 seconds of silence"
    clock.now = last + LAPSE + GRACE + 2
    assert not post.is_alive("holder")


def test_a_holder_that_came_back_counts_anew(post, other, clock):
    for accountant in (post, other):
        assert accountant.is_alive("holder")
    clock.now += GRACE
    assert not post.is_alive("holder")
    post.beat("holder")
    assert post.is_alive("holder")
    assert other.is_alive("holder")
    clock.now += LAPSE
    assert post.is_alive("holder")
    assert other.is_alive("holder")


# Beacons


class GrantsNoGraceButLooks(Presence):
    """Takes for alive whom it sees now, and nobody else."""

    def is_alive(self, holder):
        return self._seen(holder)


def test_a_heartbeat_to_one_accountant_is_seen_by_another(post, other, clock):
    pass_time(clock, 5 * GRACE, lambda: post.beat("holder"), lambda: other.is_alive("holder"))
    assert other.is_alive("holder")


def test_a_holder_is_seen_by_an_accountant_that_never_asked_before(post, place, clock):
    pass_time(clock, 3 * GRACE, lambda: post.beat("holder"))
    late = Post(place, clock, GrantsNoGraceButLooks)
    assert late.is_alive("holder")
    assert not late.is_alive("nobody")


@pytest.mark.parametrize("companions", [0, 1, 7])
def test_a_silent_holder_s_beacon_goes_out_whoever_else_lives(post, other, clock, companions):
    """Locks of one session stack: one that was taken at every heartbeat would have to be let go as often."""
    living = [f"living-{number}" for number in range(companions)]
    for name in ("holder", *living) * 3:
        post.beat(name)
    pass_time(clock, LAPSE + BEAT, *(lambda n=name: post.beat(n) for name in living))
    for accountant in (post, other):
        accountant.is_alive("holder")
    pass_time(clock, GRACE, *(lambda n=name: post.beat(n) for name in living))
    for accountant in (post, other):
        assert not accountant.is_alive("holder")
        assert all(accountant.is_alive(name) for name in living)


def test_a_holder_that_paused_is_seen_again(post, other, clock):
    """A stopped machine, a lost network: no heartbeat for longer than the beacon burns, then all is well again."""
    post.beat("holder")
    pass_time(clock, LAPSE + BEAT, lambda: other.is_alive("holder"))
    pass_time(clock, 3 * GRACE, lambda: post.beat("holder"), lambda: other.is_alive("holder"))
    assert other.is_alive("holder")


def test_an_accountant_that_dies_takes_its_beacons_along_and_its_holders_have_the_full_grace(post, other, clock):
    post.beat("holder")
    assert other.is_alive("holder")
    post.die()
    pass_time(clock, GRACE - 1, lambda: other.is_alive("holder"))
    assert other.is_alive("holder")
    pass_time(clock, 2 * BEAT, lambda: other.is_alive("holder"))
    assert not other.is_alive("holder")


def test_holders_of_a_dead_accountant_go_on_with_another(post, other, clock):
    post.beat("holder")
    post.die()
    pass_time(clock, 3 * GRACE, lambda: other.is_alive("holder"), lambda: other.beat("holder"))
    assert other.is_alive("holder")


def test_beacons_of_an_idle_accountant_go_out(place, other):
    """Its last holder was killed, and nobody has called it since; another cluster waits for what that holder held. The
    server's own clock ends its session, so this test waits for a real half second."""
    idle = Presence(place.desk().ledger, locked=nobody_here, grace=1.5)
    idle.beat("holder")
    assert other.presence._seen("holder")
    deadline = time.monotonic() + 30
    while other.presence._seen("holder"):
        assert time.monotonic() < deadline, "its beacon shines for ever"
        time.sleep(0.05)
    idle.beat("holder")
    assert other.presence._seen("holder"), "and is lit again by the next heartbeat"


def test_a_lost_session_is_lit_again(place, post, other, clock):
    """The server was restarted: a holder that is known already sends its heartbeats as before."""
    pass_time(clock, GRACE, lambda: post.beat("holder"), lambda: other.is_alive("holder"))
    place.end_sessions()
    signs = [outcome(lambda: post.beat("holder")) for _ in range(2)]
    assert all(sign.error is None or isinstance(sign.error, Unreachable) for sign in signs)
    assert signs[-1].error is None
    pass_time(clock, 2 * GRACE, lambda: post.beat("holder"), lambda: outcome(lambda: other.is_alive("holder")))
    assert other.is_alive("holder")


def test_a_server_that_is_away_is_said(place, post, clock, postgresql):
    post.beat("holder")
    database, place.database = place.database, "away"
    postgresql.sql("postgres", f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
    place.database = database
    try:
        place.end_sessions()
        for act in (lambda: post.beat("holder"), lambda: post.is_alive("holder")):
            with pytest.raises(Unreachable):
                act()
    finally:
        postgresql.sql("postgres", f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")
    post.beat("holder")
    assert post.is_alive("holder")


def test_beacons_of_one_database_are_not_seen_in_another(places, post, clock):
    elsewhere = Post(places.digits(), clock)
    post.beat("holder")
    assert elsewhere.is_alive("holder")
    clock.now += GRACE
    post.beat("holder")
    assert not elsewhere.is_alive("holder")


def test_every_name_has_a_beacon(post, other):
    """Numbers of locks have a sign in one place and none in another."""
    names = [f"digits-2025-{number}" for number in range(40)] + ["ä", "x" * 200, "a b"]
    assert {presence_module._signed(name) < 0 for name in names} == {True, False}
    for name in names:
        assert not other.presence._seen(name)
        post.beat(name)
        assert other.presence._seen(name)


def test_two_holders_with_one_number_keep_each_other_alive_and_nothing_else(post, other, clock, monkeypatch):
    monkeypatch.setattr(presence_module, "_signed", lambda name: -1)
    post.beat("one")
    post.beat("two")
    pass_time(clock, 2 * GRACE, lambda: post.beat("two"), lambda: other.is_alive("one"))
    assert other.is_alive("one"), "which is harmless"
    assert other.is_alive("two")
    pass_time(clock, LAPSE + BEAT, lambda: post.is_alive("two"))
    pass_time(clock, GRACE + BEAT, lambda: other.is_alive("one"), lambda: other.is_alive("two"))
    assert not other.is_alive("one")
    assert not other.is_alive("two")


def test_many_heartbeats_at_once(post, other):
    names = [f"holder-{number}" for number in range(16)]
    errors = []

    def beats(name):
        errors.extend(sign.error for sign in [outcome(lambda: post.beat(name)) for _ in range(5)] if sign.error)

    threads = [threading.Thread(target=beats, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert all(other.is_alive(name) for name in names)
    assert all(other.presence._seen(name) for name in names)


# What it is for


@pytest.fixture
def held(post):
    """Two leases of two holders, running; returns their epochs."""
    epochs = {}
    for name in ("dead", "living"):
        assert post.leases.reserve(name, name, [training(40), evaluation()]).fits
        post.beat(name)
        epochs[name] = run_attempt(post.desk, name, name, 1)
    return epochs


def test_a_dead_holder_s_reservation_is_released_after_its_grace_and_a_living_one_s_is_not(post, other, clock, held):
    """By another accountant than the one that the holders talk to; and the dead one was only slow."""
    price = post.desk.account().reserved_cost
    pass_time(clock, LAPSE + GRACE - BEAT, lambda: post.beat("living"), other.leases.expire_dead)
    assert post.desk.account().reserved_cost == price, "nothing is released before"
    assert post.leases.authorise("dead", held["dead"], TRAIN, 2), "and the slow one may go on"
    spent = post.desk.account().spent_cost
    expired = []
    pass_time(clock, 3 * BEAT, lambda: post.beat("living"), lambda: expired.extend(other.leases.expire_dead()))
    assert expired == ["dead"]
    assert post.desk.account().spent_cost == spent, "what was authorised stays spent"
    assert post.desk.account().reserved_cost == price // 2
    assert json.loads(post.desk.rows()[-1]["body"])["epoch"] > held["dead"]
    with pytest.raises(PurserError, match="over"):
        post.leases.authorise("dead", held["dead"], TRAIN, 3)
    assert post.leases.authorise("living", held["living"], TRAIN, 2)
    fill(other.desk)
    account = other.desk.account()
    assert account.spent_cost + account.reserved_cost <= account.budget_cost
    assert other.desk.all_valid()


def test_a_restarted_accountant_releases_nothing_before_the_full_grace(place, post, clock, held):
    post.die()
    new = Post(place, clock)
    pass_time(clock, GRACE - BEAT, lambda: new.beat("living"), lambda: new.leases.expire_dead())
    assert {hold.lease for hold in new.leases.holds(TRAIN)} == {"dead", "living"}
    pass_time(clock, 2 * BEAT, lambda: new.beat("living"), lambda: new.leases.expire_dead())
    assert {hold.lease for hold in new.leases.holds(TRAIN)} == {"living"}
    assert {hold.lease for hold in new.leases.holds(VALIDATION)} == {"living"}


class SeesOnlyItsOwn(Presence):
    """Broken on purpose: looks at no beacon."""

    def _seen(self, holder):
        return False


class GrantsNoGrace(Presence):
    """Broken on purpose: takes whom it does not know for dead."""

    def is_alive(self, holder):
        return holder in self._beats


@pytest.mark.parametrize("broken", [SeesOnlyItsOwn, GrantsNoGrace])
def test_an_accountant_that_expires_the_living_is_caught(place, post, clock, held, broken):
    for kind, released in ((Presence, []), (broken, ["living"])):
        watch, expired = Post(place, clock, kind), []
        sweep = functools.partial(lambda leases, found: found.extend(leases.expire_dead()), watch.leases, expired)
        pass_time(clock, 2 * GRACE, lambda: post.beat("living"), sweep)
        assert [name for name in expired if name == "living"] == released


# On one machine


def test_on_an_embedded_ledger_the_kernel_decides_at_once(tmp_path, monkeypatch):
    """No clock, no grace, no heartbeats: the lock on a file dies with its process."""
    monkeypatch.setenv(HOME, str(tmp_path))
    monkeypatch.delenv(LEDGER, raising=False)
    places = SqlitePlaces(tmp_path)
    desk = places.digits().desk()
    presence = Presence(desk.ledger, is_alive, clock=lambda: pytest.fail("there is no need for a clock"))
    leases = Leases(desk.books, presence.is_alive)
    leases.reserve("lease", "run", [training()])
    held = Alive("run")
    presence.beat("run")
    assert presence.is_alive("run")
    assert leases.expire_dead() == []
    held.release()
    assert not presence.is_alive("run")
    assert leases.expire_dead() == ["lease"]
    assert desk.account().reserved_cost == 0
    places.give_back()


def test_a_holder_on_this_machine_lives_as_long_as_its_lock_on_a_server_too(place, clock, tmp_path, monkeypatch):
    """Also while it is too busy to send heartbeats."""
    monkeypatch.setenv(HOME, str(tmp_path))
    monkeypatch.setenv(LEDGER, place.url)
    presence = Presence(place.desk().ledger, clock=clock)
    held = Alive("run")
    assert presence.is_alive("run")
    clock.now += 10 * GRACE
    assert presence.is_alive("run")
    held.release()
    assert presence.is_alive("run"), "it may have moved to another machine"
    clock.now += GRACE
    assert not presence.is_alive("run")
