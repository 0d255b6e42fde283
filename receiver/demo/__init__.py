"""Room: `receiver demo`. The stand-in provider, the packaged S3 server and the receiver together, on loopback only.

Read `demo.py` first; `board.py` shows the progress in the terminal.
"""
