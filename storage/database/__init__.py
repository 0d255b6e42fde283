"""Room: the database. Connections to an SQLite file or PostgreSQL, sessions, transactions, the clock, waking.

It knows no table. Read `sessions.py` first, then `postgresql.py` (poolers, demoted primaries), `outages.py` (one log
line for each change of state), `turnstile.py` (fair turns for SQLite's writers), `group_writer.py` (threads of a worker
share transactions), `prepared.py` (their session, and the statements of the hot path), `walk.py` (a table in bounded
parts) and `wakers.py` (how an idle worker learns that another process has committed work).
"""
