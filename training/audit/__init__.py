"""Empirical audits: what can be told of a run's privacy from the scores of records whose membership is nobody's secret.

Plain numpy, SciPy and dp_accounting: no Ray, no torch, no files. Only scores of canaries, which are made up, and of
records declared public may come in here. A real member's score is computed from a private record and is a private
output (P13).
"""
