"""The stream's work over history that lies ready: the same joiner, labeller, profile fold and trainer, no broker."""
