"""Empirical audits: what can be told of a run's privacy from the scores of records whose membership is nobody's secret.

Statistics (bounds, power, claim, membership) are plain numpy, SciPy and dp_accounting; canaries, what a worker sees of
them (watch) and shadow models need torch as well; the command asks the ledger. No Ray. Only scores of canaries, which
are made up, and of records declared public may come in here. A real member's score is computed from a private record
and is a private output (P13).
"""
