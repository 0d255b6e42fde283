"""Room: the packaged S3 server on this machine, for users without a bucket, for tests and for the demo.

It leans on `receiver.base` for settings. Read `serve_store.py` first (what `serve --store DIR` starts), then
`seaweed.py` (how one SeaweedFS process is started, monitored and stopped).
"""
