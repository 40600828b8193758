"""Sweeps: the search space, the price before the purchase, the admission-gated search, the sweep and its table.

Decisions here use noised or public metrics only.
"""
