"""Kling: its HTTP API (`client.py`), request model, callback and task bodies (`report.py`) and prices."""
