"""Room: providers. `base.py` is what every provider offers; each has a folder with its wire format, request and prices.

Only `receiver/app/wiring.py` knows which providers there are. Read `base.py` first, then `kling/client.py`.
`webhook_signature.py` checks the signatures of callbacks.
"""
