"""The HTTP server: callbacks in, asset links, the event stream, health and metrics.

Callbacks come first: nothing else in this room may delay them. Handlers run in one event loop; database and bucket are
used in threads. State in memory is per process: open streams, the readiness result, counters.

It uses the gateway, events, tasks, providers and base, and all of storage. Read `app.py` first (which path leads
where), then `callbacks.py`.
"""
