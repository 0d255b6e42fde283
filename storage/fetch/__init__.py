"""Room: fetches one result file from an untrusted URL and checks that it is a whole picture, film or sound.

The room leans on `storage.errors` and `storage.spool` only; it knows no rows and no bucket. Read `client.py` first
(`Fetcher.fetch`), then `addresses.py` (which addresses may be dialled), `connection.py` (the guarded socket),
`transfer.py` (kept connections, length, coding, resume) and `media_types.py` (formats, one module each). In memory per
process: the TLS context, idle connections, a buffer a thread and a bound on lookups.
"""
