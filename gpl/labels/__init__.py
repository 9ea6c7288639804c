"""Pseudo-labels: match candidates to a user's anchors, weigh by confidence, calibrate to a click probability."""
