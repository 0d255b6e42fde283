"""Room: objects in one S3 bucket. The only room of storage that knows boto3.

An object is created once, proven by checksum or by reading it back, and never overwritten. The room leans on
`storage.errors` and `storage.keys` only; it knows no rows. Read `bucket.py` first (`Bucket.put_once`), then `probe.py`
for what stores differ in and `store_connection.py` for the clients. In memory per process: the probed capabilities and
one boto3 client per endpoint.
"""
