"""Who still lives among the holders of leases: what an accountant must know before it releases a reservation (P3).

Getting it wrong overspends nothing: a holder that was given up for dead finds its epoch over and stops. On an embedded
ledger the kernel knows, by a lock on a file that dies with the process. On a shared one, holders send heartbeats to
their accountant, which lights a beacon in the database for the other accountants on it.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable

import sqlalchemy as sa

from cluster import environment
from cluster.accounting.ledger import Ledger

BEAT = 10.0  # seconds between heartbeats
LAPSE = 40.0  # without a heartbeat for so long, a holder's beacon goes out
GRACE = 120.0  # without any sign of life for so long, a holder is dead; a restarted accountant begins to count anew
_BEACON = 0x70757273  # the class of our advisory locks ("purs")
_LIGHT = sa.text(f"SELECT pg_try_advisory_lock_shared({_BEACON}, :name)")
_DOUSE = sa.text(f"SELECT pg_advisory_unlock_shared({_BEACON}, :name)")
_PING = sa.text("SELECT 1")  # a session that was lost is found, and its beacons lit again
_IDLE = sa.text(
    "SELECT set_config('idle_session_timeout', :lapse, false) "
    "WHERE current_setting('server_version_num')::int >= 140000"
)
_SEEN = sa.text(
    "SELECT EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 2 "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
    f"AND classid::bigint = {_BEACON} AND objid::bigint = :name)"
)


class Presence:
    """Signs of life of the holders on one ledger, as one accountant sees them.

    Args:
        locked: whether a process of this machine holds the lock file of a holder.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        ledger: Ledger,
        locked: Callable[[str], bool] = environment.is_alive,
        grace: float = GRACE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger, self._locked, self._grace, self._clock = ledger, locked, grace, clock
        self._lapse = min(LAPSE, grace / 3)
        self._beats: dict[str, float] = {}
        self._absent: dict[str, float] = {}
        self._beacons: sa.Connection | None = None
        self._lit: set[str] = set()
        self._turn = threading.Lock()

    def beat(self, holder: str) -> None:
        """`holder` says that it lives."""
        if self._ledger.embedded:
            return
        with self._turn:
            self._beats[holder] = self._clock()
            self._absent.pop(holder, None)
            self._light()

    def is_alive(self, holder: str) -> bool:
        """Whether `holder` must be taken to live: it shows a sign of life, or has not been silent for long enough."""
        if self._locked(holder):
            return True
        if self._ledger.embedded:
            return False
        with self._turn:
            if self._shines(holder):
                self._absent.pop(holder, None)
                return True
            now = self._clock()
            return now - self._absent.setdefault(holder, now) < self._grace

    def is_silent(self, holder: str) -> bool:
        """Whether `holder` shows no sign of life now. It is taken to live until the grace is over, see `is_alive`."""
        if self._locked(holder):
            return False
        if self._ledger.embedded:
            return True
        with self._turn:
            return not self._shines(holder)

    def _shines(self, holder: str) -> bool:
        self._light()  # our own beacon of one who went silent must not pass for another accountant's
        return holder in self._beats or self._seen(holder)

    def _light(self) -> None:
        """One session of the database holds a lock for every living holder; all end with this process."""
        now = self._clock()
        self._beats = {name: at for name, at in self._beats.items() if now - at < self._lapse}
        try:
            if self._beacons is not None and not self._answers(self._beacons):
                self._beacons = None
            if self._beacons is None:
                self._beacons, self._lit = self._ledger.session(), set()
                # Should nobody call any more, the server ends the session: beacons need no timer of ours to go out.
                self._beacons.execute(_IDLE, {"lapse": f"{self._lapse * 1000:.0f}"})
            for name in self._lit - set(self._beats):
                self._beacons.execute(_DOUSE, {"name": _signed(name)})
                self._lit.remove(name)
            for name in set(self._beats) - self._lit:
                self._beacons.execute(_LIGHT, {"name": _signed(name)})
                self._lit.add(name)
        except self._ledger.errors as error:  # all beacons are out, and are lit again by the next heartbeat
            if self._beacons is not None:
                self._beacons.invalidate()
                self._beacons.close()
            self._beacons = None
            raise self._ledger.failure(error) from None

    def _answers(self, session: sa.Connection) -> bool:
        try:
            session.execute(_PING)
        except self._ledger.errors:
            session.invalidate()
            session.close()
            return False
        return True

    def _seen(self, holder: str) -> bool:
        with self._ledger.reading() as view:
            return bool(view.scalar(_SEEN, name=_signed(holder) % 2**32))


def _signed(name: str) -> int:
    """A holder's number among the locks. Two holders with one number keep each other alive, which is harmless."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big", signed=True)
