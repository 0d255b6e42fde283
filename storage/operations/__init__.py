"""Room: what operators and health checks need, and what leaves the rows as events.

Measures, alerts on deadlines, worker heartbeats, maintenance (retry, dismiss, prune), and the outbox of events. It may
lean on every other room of storage. Read `outbox.py` first for delivery of events, `maintenance.py` for the verbs.
"""
