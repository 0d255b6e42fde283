"""Room: limits and names that belong to a provider's account or to a client.

Slots (pictures in progress at once), the rate of reads, batches of tasks, and idempotency keys of gateway clients. The
room leans on `storage.rows`. Read `slots.py` first: the order of its locks holds for every writer of tasks.
"""
