"""Brokers: the ones a machine can start for itself, and the choice between them and one that is already there."""
