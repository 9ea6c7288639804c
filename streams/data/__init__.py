"""Data directories: one's own items, recalls and feedback as JSON lines, the exact records of the topics."""
