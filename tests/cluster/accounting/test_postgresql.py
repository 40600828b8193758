"""Whom a server lets do what: the service's role may read and append and nothing else (P5), and what is no ledger, or
may not be made one, is refused in one sentence and stays as it was (P4)."""

from __future__ import annotations

import psycopg
import psycopg.sql
import pytest
from bookkeeping import TRAIN, training
from places import PostgresqlPlace
from postgresql import OWNER, SERVICE, SUPERUSER

from cluster.accounting.ledger import Ledger, init
from cluster.errors import PurserError, Unreachable, UsageError

TABLES = {"entries": ("key", "account"), "secrets": ("value", "name")}


@pytest.fixture(scope="module")
def database():
    return "postgresql"


@pytest.fixture
def desk(started):
    return started


def sql(place, role, statement):
    """One statement as `role`, outside the ledger."""
    with psycopg.connect(place.server.url(place.database, role)) as connection:
        return connection.execute(statement)


# Rights


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE {0} SET {1} = 'x'",
        "UPDATE {0} SET {1} = 'x' WHERE false",
        "DELETE FROM {0}",
        "TRUNCATE {0}",
        "INSERT INTO {0} SELECT * FROM {0} LIMIT 1 ON CONFLICT ({2}) DO UPDATE SET {1} = 'x'",
        "MERGE INTO {0} a USING {0} b ON a.{2} = b.{2} WHEN MATCHED THEN DELETE",
        "SELECT * FROM {0} FOR UPDATE",
        "LOCK TABLE {0} IN ACCESS EXCLUSIVE MODE",
        "DROP TABLE {0}",
        "ALTER TABLE {0} ADD COLUMN more integer",
        "ALTER TABLE {0} RENAME TO other",
        "ALTER TABLE {0} DISABLE TRIGGER ALL",
        "ALTER TABLE {0} DISABLE TRIGGER {0}_append_only",
        "ALTER TABLE {0} OWNER TO service",
        "DROP TRIGGER {0}_append_only ON {0}",
        "CREATE TRIGGER mine BEFORE INSERT ON {0} EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "CREATE RULE mine AS ON INSERT TO {0} DO INSTEAD NOTHING",
        "CREATE INDEX mine ON {0} ({1})",
        "CREATE OR REPLACE FUNCTION purser_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RETURN NULL; END $$",
        "DROP FUNCTION purser_append_only() CASCADE",
        "SET session_replication_role = replica",
        "CREATE TABLE public.more (x integer)",
        "CREATE SCHEMA service",
        "COPY {0} TO PROGRAM 'cat'",
    ],
)
def test_the_service_may_read_and_append_and_nothing_else(place, table, statement):
    before = place.contents()
    column, unique = TABLES[table]
    unique = "account, seq" if table == "entries" and "CONFLICT" in statement else unique
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        sql(place, SERVICE, statement.format(table, column, unique))
    assert place.contents() == before


def test_the_service_has_exactly_two_rights_and_can_give_itself_no_more(place):
    """As the server itself lists them, for every role that is not the owner."""
    for table in TABLES:
        sql(place, SERVICE, f"GRANT UPDATE, DELETE, TRUNCATE ON {table} TO service, PUBLIC")  # a warning, and no more
    rights = place.read(
        "SELECT DISTINCT grantee, privilege_type FROM information_schema.role_table_grants "
        "WHERE table_schema = 'public' AND grantee <> 'owner' ORDER BY privilege_type"
    )
    assert [tuple(right.values()) for right in rights] == [(SERVICE, "INSERT"), (SERVICE, "SELECT")]
    assert sql(place, SERVICE, "SELECT COUNT(*) FROM entries").fetchone()
    sql(place, SERVICE, "INSERT INTO secrets VALUES ('partition:more', 'x')")


def test_a_session_of_the_service_can_deceive_itself_alone(place, desk):
    """A temporary table of the same name hides the ledger from the session that made it."""
    before = desk.totals()
    with psycopg.connect(place.url, autocommit=True) as fooled:
        fooled.execute("CREATE TEMP TABLE entries (LIKE public.entries)")
        assert fooled.execute("SELECT COUNT(*) FROM entries").fetchone() == (0,)
        assert place.desk().totals() == desk.totals() == before


@pytest.mark.parametrize("role", [OWNER, SUPERUSER])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "statement", ["UPDATE {0} SET {1} = {1}", "UPDATE {0} SET {1} = 'x' WHERE false", "DELETE FROM {0}", "TRUNCATE {0}"]
)
def test_not_even_the_owner_changes_it_by_mistake(place, role, table, statement):
    """Who owns the database could drop the triggers: that takes intent, and `verify --head` finds it."""
    before = place.contents()
    with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
        sql(place, role, statement.format(table, TABLES[table][0]))
    assert place.contents() == before


# What is no ledger


@pytest.fixture
def empty(postgresql):
    """A database in which nothing was made."""
    database = postgresql.create()
    place = PostgresqlPlace(postgresql, database)
    yield place
    place.close()
    postgresql.drop(database)


def tables(place):
    return place.read("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")


@pytest.mark.parametrize("role", [SERVICE, OWNER])
def test_an_empty_database_is_refused_and_stays_empty(empty, role):
    """It may be the right server after a loss, or the wrong one: a new ledger would grant the whole budget again."""
    with pytest.raises(UsageError, match="holds no ledger") as raised:
        Ledger(empty.server.url(empty.database, role))
    assert "accountant init" in str(raised.value)
    assert empty.database in str(raised.value)
    assert tables(empty) == []


def test_a_role_without_rights_is_refused(place, postgresql):
    postgresql.sql("postgres", "CREATE ROLE stranger LOGIN")
    before = place.contents()
    try:
        for act in (
            lambda: place.desk().ledger.identity,
            lambda: place.desk().account(),
            lambda: place.desk().leases.reserve("lease", "run", [training()]),
        ):
            url, place.url = place.url, place.server.url(place.database, "stranger")
            with pytest.raises(PurserError, match="permission") as raised:
                act()
            place.url = url
            assert not isinstance(raised.value, Unreachable), "to try again mends nothing"
            assert "stranger@" in str(raised.value)
        with pytest.raises(PurserError):
            init(place.server.url(place.database, "stranger"))
        assert place.contents() == before
    finally:
        postgresql.sql("postgres", "DROP ROLE stranger")


def test_init_by_a_role_that_may_make_nothing_makes_nothing(empty):
    with pytest.raises(PurserError, match="could not be made"):
        init(empty.url)
    assert tables(empty) == []


def test_an_unknown_service_role_is_refused_and_nothing_is_made(empty):
    with pytest.raises(UsageError, match=r"--service.*nobody"):
        init(empty.server.url(empty.database, OWNER), "nobody")
    assert tables(empty) == []


@pytest.mark.parametrize("service", ["PUBLIC", "public", "service; DROP TABLE entries", 'a"b', ""])
def test_a_service_that_is_no_role_s_name_is_refused(empty, service):
    with pytest.raises(UsageError, match="--service"):
        init(empty.server.url(empty.database, OWNER), service)
    assert tables(empty) == []


@pytest.mark.parametrize("role", ["user", "Service Role", 'quo"te', "100%"])
def test_any_role_s_name_will_do(empty, role):
    quoted = psycopg.sql.Identifier(role)
    with psycopg.connect(empty.server.url(empty.database, SUPERUSER), autocommit=True) as superuser:
        superuser.execute(psycopg.sql.SQL("CREATE ROLE {} LOGIN").format(quoted))
        try:
            init(empty.server.url(empty.database, OWNER), role)
            rights = "SELECT privilege_type AS p FROM information_schema.role_table_grants WHERE grantee = :role"
            assert {right["p"] for right in empty.read(rights, role=role)} == {"SELECT", "INSERT"}
        finally:
            superuser.execute(psycopg.sql.SQL("DROP OWNED BY {}").format(quoted))
            superuser.execute(psycopg.sql.SQL("DROP ROLE {}").format(quoted))


RIGHTS = "SELECT relname, CAST(relacl AS text) FROM pg_class WHERE relname IN ('entries', 'secrets') ORDER BY 1"


def test_init_again_is_harmless(place, desk):
    before, rights = place.contents(), place.read(RIGHTS)
    for service in (None, SERVICE, SERVICE):
        init(place.server.url(place.database, OWNER), service)
    assert place.contents() == before
    assert place.read(RIGHTS) == rights
    assert desk.leases.authorise("lease", 1, TRAIN, 2)
    with pytest.raises(psycopg.errors.RaiseException):
        sql(place, OWNER, "DELETE FROM entries")
