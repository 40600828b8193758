"""One private run: the job file, data, models, the DP-SGD engine, the Ray Train loop, evaluation and release.

Knows the accountant only as something that grants or refuses blocks; knows nothing of sweeps.
"""
