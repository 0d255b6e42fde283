"""Room: the packaged S3 server on this machine, for those who have no bucket yet and for tests and the demo.

It leans on `receiver.base` for settings. Read `serve_store.py` first (what `serve --store DIR` starts), then
`seaweed.py` (how one SeaweedFS process is started, watched and stopped).
"""
