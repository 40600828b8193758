#!/bin/sh
# Make what compose.yaml keeps secret, once; what is there stays as it is, since a database keeps its first passwords.
set -eu
cd "$(dirname "$0")"
# The folder is its owner's alone. The files in it are mounted one by one, and read by other users inside containers.
mkdir -p -m 0700 secrets
umask 022

keep() { [ -s "secrets/$1" ] || cat > "secrets/$1"; }
draw() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

for name in ray-token owner-password service-password grafana-password; do
    draw | keep "$name"
done
for role in owner service; do
    printf 'postgresql://purser_%s:%s@ledger/books' "$role" "$(cat "secrets/$role-password")" | keep "$role-url"
done
