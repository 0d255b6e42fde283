"""Room: what operators and health checks need, and how events leave the rows.

Measures, alerts on deadlines, worker heartbeats, maintenance (retry, dismiss, prune), and the outbox of events. It may
lean on every other room of storage. Read `outbox.py` first for delivery of events, `maintenance.py` for the commands.
`ended.py` counts the ends of tasks and holds the last day for the metrics; `rollups.py` holds a month in hours for the
console, and `attention.py` finds what may need a person.
"""
