"""The streaming system around gpl: contracts, agents, trainer, scorer, metrics and the command line."""
