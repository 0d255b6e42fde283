"""The processes: how the parts are put together and run, and the entry points for Python code.

`wiring.py` makes the parts from the settings, `jobs.py` says what a worker does, also one that works once, `process.py`
runs web server and workers, `library.py` is `from receiver import Receiver`.

It may use every room but `cli` and `demo`. Read `jobs.py` first.
"""
