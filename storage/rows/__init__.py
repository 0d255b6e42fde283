"""Room: the rows. Everything that must survive a crash is a committed row; a row is also the job that works on it.

It leans on `storage.database` and the root modules of storage. Read `models.py` first, then `claims.py` (who works on a
row), `tasks.py` (finding and locking tasks) and `reports.py` (how a report changes a task). Each function that takes a
session leaves the transaction to its caller.

The hot path (claims, deliveries, applying, events) uses Core statements on tables, compiled once and executed by
`prepared.execute` or `sessions.run`; the rest uses the ORM. Measured: settling a picture takes 3.9 ms of CPU through
the ORM and 1.3 ms this way.
"""
