"""Room: events out. What happened to tasks is delivered to the configured sinks, in order for each task.

It leans on `receiver.tasks` and the event rows. Read `dispatcher.py` first (which events a sink still needs), then
`make.py` (from a setting to a sink) and one sink, for example `webhook.py`. `receiver/base/retry_schedule.py` has the
delays between tries.
"""
