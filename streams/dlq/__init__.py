"""Looking at the dead letters and sending them back: ``gpl dlq``."""
