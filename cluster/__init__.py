"""What all runs share: the accounting, the session with Ray, names and errors.

Nothing here knows how a model is trained or a sweep is searched; imports from `training` and `tuning` may not happen.
"""
