"""Room: providers. `base.py` is what every provider offers; each has a folder with its wire format, request and prices.

`registry.py` makes those that there are. Submitting, slots, prices and the gateway use Kling only so far.
`webhook_signature.py` checks the signatures of callbacks. Read `base.py` first, then `kling/client.py`.
"""
