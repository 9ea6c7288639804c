"""The incremental trainer: label records in, checkpoints and published pre-rankers out.

Read in the order the data takes: ``source`` (the log), ``intake`` (checks), ``dedup`` (what is new), ``batch``
(arrays), ``validation`` (score before training), ``trainer`` (one step), ``checkpoint``, ``publish``, ``loop``.
"""
