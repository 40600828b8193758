#!/bin/sh
# Start the accountant on the head node, as soon as Ray, the ledger's URL and the ledger are there:
#
#     accountant.sh FILE        FILE holds the URL of the ledger's service role
#
# The URL is in the environment of this one command. In that of `ray start`, whatever runs on the head would inherit
# it, drivers of jobs included. Code on the head can still read FILE: infra/README.md says what follows from that.
until ray health-check > /dev/null 2>&1 && [ -s "$1" ] && PURSER_LEDGER="$(cat "$1")" purser accountant start; do
    sleep 5
done
