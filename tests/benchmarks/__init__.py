"""Measured ratios: both sides of each in one run. Never collected by pytest: a timing is not a test."""
