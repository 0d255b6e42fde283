"""Room: limits and names that belong to a provider's account, to a client or to a person.

Slots (pictures in progress at once), the rate of reads, batches of tasks, idempotency keys of gateway clients, and used
log-ins and log-outs of people at the console. The room leans on `storage.rows`. Read `slots.py` first: the order of its
locks holds for every writer of tasks.
"""
