"""Room: objects in one S3 bucket. The only room of storage that knows boto3.

An object is created once, proven by checksum or by reading it back, and never overwritten. The room leans on
`storage.errors`, `storage.keys` and `storage.spool` only; it knows no rows. Read `bucket.py` first (`Bucket.put_once`),
then `stored.py` for reading, listing and removing, `signed_requests.py` for the one request that most files need,
`probe.py` for the differences between stores and `store_connection.py` for boto3's clients. In memory per process: the
probed capabilities, one boto3 client per endpoint and idle connections.
"""
