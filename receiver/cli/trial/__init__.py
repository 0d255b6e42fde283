"""Room: the commands that try things without an account.

`demo.py` shows everything at once, `sandbox.py` runs the stand-in provider for a receiver of one's own.
"""
