"""The DP-SGD engine: plain torch and Opacus, no Ray, the same code under Ray Train, torchrun or one process.

A run's σ, C, q and T exist once, in `run.DPSGDRun`, which feeds sampler, clipper, noise and lease. No hook is offered
where a plausible custom part would silently void the guarantee. Nothing here prints, logs or returns anything
computed from records but the noised parameters themselves.
"""
