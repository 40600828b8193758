"""Random lives of leases on one ledger: what holders and owners ask of three accountants in turn, with crashes around
every commit, calls repeated, delayed and reordered, and holders that die. See `Observer` for what must hold."""

from __future__ import annotations

from bookkeeping import TRAIN, evaluation, training
from crashes import Killed, outcome
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from observer import Call, Observer

from cluster.accounting.leases import CLOSING

LEASES = tuple("abcdef")
DATASETS = ("digits", "letters", "faces")
FAULTS = ("before", "after", "killed before", "killed after")
LEASE, SEAT = st.sampled_from(LEASES), st.integers(0, 2)
FAULT = st.sampled_from(("",) * 6 + FAULTS)
RETRY = st.sampled_from(("here", "elsewhere", "later"))


class LeaseMachine(Observer):
    """See the top of this file."""

    # What holders do

    @initialize(others=st.integers(0, 540), steps=st.integers(40, 120))
    def others_hold_much_and_a_run_begins(self, others, steps):
        """Otherwise most examples end before the budget is short or a block is authorised."""
        self.living |= {"others", "a"}
        if others:
            assert self.ask(Call("reserve", "others", ("others", (training(others),))), 0).get().fits
        if self.ask(Call("reserve", "a", ("a", (training(steps), evaluation(3)))), 0).get().fits:
            self.ask(Call("open", "a", ("first", 0)), 1).get()

    @rule(lease=LEASE, data=st.data(), seat=SEAT, fault=FAULT, retry=RETRY)
    def reserve(self, lease, data, seat, fault, retry):
        there = sorted(self.datasets())
        charges = []
        for name in data.draw(st.sampled_from([*([d] for d in there), there])):
            charges.append(training(data.draw(st.integers(1, 300)), f"{name}/train"))
            if times := data.draw(st.integers(0, 5)):
                charges.append(evaluation(times, f"{name}/validation"))
        self.living.add(lease)
        self.ask(Call("reserve", lease, (lease, tuple(charges))), seat, fault, retry)

    @precondition(lambda self: set(self.reserved) - {"others"})
    @rule(lease=LEASE, data=st.data(), seat=SEAT, fault=FAULT, retry=RETRY)
    def reserve_instead_of_another(self, lease, data, seat, fault, retry):
        """As a final run does of what was held back for it: as much, or a little more or less."""
        held = data.draw(st.sampled_from(sorted(set(self.reserved) - {"others"})))
        charges = []
        for charge in self.reserved[held]:
            steps = max(1, charge.steps + data.draw(st.sampled_from((0, 0, -1, 1, 40))))
            one = training if charge.account.endswith("/train") else evaluation
            charges.append(one(steps, charge.account))
        self.living.add(lease)
        instead = held if held != lease else None
        self.ask(Call("reserve", lease, (lease, tuple(charges), instead)), seat, fault, retry)

    @precondition(lambda self: set(self.reserved) - self.settled)
    @rule(data=st.data(), seat=SEAT, fault=FAULT, retry=RETRY)
    def begin_or_crash_and_begin_again(self, data, seat, fault, retry):
        """A worker group starts: the first, or one after it was restarted."""
        lease = data.draw(st.sampled_from(sorted(set(self.reserved) - self.settled)))
        most = min(charge.steps for charge in self.reserved[lease] if charge.account.endswith("/train"))
        done = data.draw(st.integers(0, most))
        times = [charge.steps for charge in self.reserved[lease] if not charge.account.endswith("/train")]
        judged = data.draw(st.integers(0, min(times, default=0)))
        if lease in self.running():
            self.run_next_blocks(seat, lease, data.draw(st.integers(0, 2)))
        self.living.add(lease)
        self.ask(Call("open", lease, (f"nonce-{next(self.nonces)}", done, judged)), seat, fault, retry)

    @precondition(lambda self: self.running())
    @rule(data=st.data(), seat=SEAT, count=st.integers(1, 3), fault=FAULT, retry=RETRY)
    def run_blocks(self, data, seat, count, fault, retry):
        self.run_next_blocks(seat, data.draw(st.sampled_from(self.running())), count, fault, retry)

    def next_block(self, lease: str, account: str) -> Call:
        epoch = self.newest(lease).epoch
        paid = sum(key[:3] == (lease, epoch, account) for key in self.granted)
        return Call("authorise", lease, (epoch, account, paid + 1))

    def run_next_blocks(self, seat, lease, count, fault="", retry="here"):
        """The newest attempt of a lease asks for its next blocks, on every account in turn."""
        for charge in self.reserved.get(lease, ()):
            for _ in range(count):
                self.ask(self.next_block(lease, charge.account), seat, fault, retry)
                fault = ""

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), seat=SEAT, block=st.integers(1, 6), off=st.sampled_from([0, 0, 0, 1, -1]))
    def ask_for_any_block_in_any_attempt(self, data, seat, block, off):
        lease = data.draw(st.sampled_from(sorted(self.attempts)))
        attempt = data.draw(st.sampled_from(list(self.attempts[lease].values())))
        account = data.draw(st.sampled_from(sorted(attempt.steps)))
        self.ask(Call("authorise", lease, (max(0, attempt.epoch + off), account, block)), seat)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), seat=SEAT, kind=st.sampled_from(CLOSING), meant=st.booleans(), fault=FAULT, retry=RETRY)
    def close(self, data, seat, kind, meant, fault, retry):
        """By a holder that says which attempt it means, as clients do, or by one that does not."""
        lease = data.draw(st.sampled_from(sorted(self.reserved)))
        if lease in self.running():
            self.run_next_blocks(seat, lease, data.draw(st.integers(0, 2)))
        epoch = self.seats[seat][0].leases.epoch(lease) if meant else None
        self.ask(Call("close", lease, (kind, "stopped", epoch)), seat, fault, retry)

    @precondition(lambda self: set(self.reserved) - self.settled)
    @rule(data=st.data(), seat=SEAT, kind=st.sampled_from(CLOSING))
    def close_too_late(self, data, seat, kind):
        """The word that an attempt is to be closed arrives when the next has begun, and closes nothing."""
        lease = data.draw(st.sampled_from(sorted(set(self.reserved) - self.settled)))
        epoch = self.seats[seat][0].leases.epoch(lease)
        self.ask(Call("open", lease, (f"nonce-{next(self.nonces)}", 0)), seat + 1)
        self.ask(Call("close", lease, (kind, "late", epoch)), seat)
        if lease in self.running():
            self.run_next_blocks(seat, lease, 1)

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), seat=SEAT, fault=FAULT, retry=RETRY)
    def an_old_call_arrives_again(self, data, seat, fault, retry):
        self.ask(data.draw(st.sampled_from(self.calls)), seat, fault, retry)

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), seat=SEAT, fault=FAULT)
    def many_share_a_commit(self, data, seat, fault):
        """Old calls and new ones, and maybe one that fails when it has written half of what it wanted."""
        calls = data.draw(st.lists(st.sampled_from(self.calls), min_size=1, max_size=3))
        for lease in data.draw(st.lists(st.sampled_from(self.running() or ["a"]), max_size=2)):
            if lease in self.running():
                calls.append(
                    self.next_block(lease, self.reserved[lease][0].account if lease in self.reserved else TRAIN)
                )
        if how := data.draw(st.sampled_from(("", "refused", "refused late", "a bug"))):
            calls.append(Call("fail", "nobody", (how,)))
        calls = data.draw(st.permutations(calls))
        self.calls.extend(call for call in calls if call not in self.calls and call.what != "fail")
        clear = {lease for call in calls for lease in call.leases} - self.uncertain
        told = self.perform(seat, fault, *calls)
        if any(done is None for done in told):
            self.perform(seat + 1, "", *calls)
        self.uncertain -= clear

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), seat=SEAT, fault=FAULT)
    def holders_die(self, data, seat, fault):
        """Or are only slow: what they ask for afterwards is refused."""
        dead = data.draw(st.sets(st.sampled_from(sorted(self.reserved)), max_size=2)) - {"others"}
        attempts = {lease: self.newest(lease) for lease in dead & set(self.running())}
        self.living -= dead
        desk, faults = self.seats[seat]
        faults.next = [fault] if fault else []
        done = outcome(desk.leases.expire_dead)
        fired, faults.next = bool(fault) and not faults.next, []
        if fired:
            if isinstance(done.error, Killed):
                self.seats[seat][0].ledger.close()
                self.seats[seat] = self.sit_down(seat)
            self.uncertain |= set(LEASES) - self.living
            done = outcome(self.seats[seat - 1][0].leases.expire_dead)
        self.look()
        expired = set(done.get())
        assert not expired & self.living, "a living holder's lease was expired"
        for lease in expired:
            self.over(lease)
        for lease in sorted(expired & set(attempts)):
            paid = sum(key[:3] == (lease, attempts[lease].epoch, TRAIN) for key in self.granted)
            self.ask(Call("authorise", lease, (attempts[lease].epoch, TRAIN, paid + 1)), seat)

    # What owners do

    @rule(
        name=st.sampled_from(DATASETS),
        other=st.sampled_from((None, None, *DATASETS)),
        seat=SEAT,
        fault=FAULT,
        retry=RETRY,
    )
    def create_a_dataset(self, name, other, seat, fault, retry):
        """A new one, one that is there already, or one whose data belong to another."""
        sources = (f"hmac-of-{name}", *([f"hmac-of-{other}"] if other not in (None, name) else []))
        self.ask(Call("create", f"dataset:{name}", (name, sources)), seat, fault, retry)
