"""Room: what operators and health checks need, and what leaves the rows as events.

Measures, alerts on deadlines, worker heartbeats, maintenance (retry, dismiss, prune), and the outbox of events. It may
lean on every other room of storage. Read `outbox.py` first for delivery of events, `maintenance.py` for the verbs.
`ended.py` counts the ends of tasks and keeps the last day for the metrics; `rollups.py` keeps a month in hours for the
console; `thumbnails.py` keeps its small pictures, and `attention.py` finds what may need a person.
"""
