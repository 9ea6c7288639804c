"""Judging: metrics and their confidence intervals."""
