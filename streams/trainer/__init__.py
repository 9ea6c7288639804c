"""The incremental trainer: label records in, checkpoints and published pre-rankers out.

Read in the order the data takes: ``source`` (the log), ``intake`` (checks), ``columns`` (arrays), ``dedup`` (what is
new), ``batch`` (rows), ``validation`` (score before training), ``trainer`` (one step), ``checkpoint``, ``publish``,
``loop``. Several processes that train as one: ``group``, started by ``ranks``.
"""
