"""Room: the gateway. Kling's HTTP API for clients that change their base URL, with our rows behind it.

All that we say to such clients in Kling's words is here, their callbacks and the OpenAPI document included. It leans on
`receiver.tasks`. Read `gateway.py` first (paths and keys), then `creates.py` and `answers.py`.
"""
