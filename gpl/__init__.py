"""Generative pseudo-labelling: the method. No Kafka, no wall clock, no global state."""
