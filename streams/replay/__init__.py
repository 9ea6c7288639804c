"""Replay: the log read again, by the code that labels, to repeat, compare, question and explain what it said.

Nothing here joins a consumer group, commits an offset or writes to a topic that production reads.
"""
