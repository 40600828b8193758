#!/bin/sh
# Run once by the PostgreSQL image when its volume is new, as the role that owns the database: the accountant's own role.
# What it may do with the tables, `purser accountant init --service purser_service` grants when they are made.
set -eu
psql -v ON_ERROR_STOP=1 -v database="$POSTGRES_DB" -v password="$(cat "$SERVICE_PASSWORD_FILE")" \
    --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
CREATE ROLE purser_service LOGIN PASSWORD :'password';
REVOKE ALL ON DATABASE :"database" FROM PUBLIC;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT CONNECT ON DATABASE :"database" TO purser_service;
GRANT USAGE ON SCHEMA public TO purser_service;
SQL
