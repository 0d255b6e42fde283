"""What every other room of the receiver may use: settings, tokens, signatures, logs and metrics.

It uses storage and no other room of the receiver. The registry of metrics is global to the process. Read `config.py`
first.
"""
