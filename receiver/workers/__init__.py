"""Room: how a process works. Lanes claim due rows of one kind, work on them in threads, and renew their leases.

It leans on storage alone and knows no provider and no sink: `receiver/app/jobs.py` says which lanes there are. Read
`lanes.py` first (what there is to work on), then `worker.py`, `in_hand.py` (rows under way), `leases.py` (their renewal
and release), `group_claims.py` (claims in the transaction that makes rows due), `due_checks.py` (how idle lanes check
together whether rows are due) and `wake_ups.py` (which of them a check wakes). `supervisor.py` forks the worker
processes of `receiver serve` and starts them again.
"""
