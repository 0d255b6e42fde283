"""Room: a task's files and manifests in the bucket, from the first put to audit, repair, rebuild, export and delete.

It leans on `storage.rows`, `storage.bucket` and `storage.fetch`. Read `archiver.py` first (one file, from URL to
object), then `manifest.py` (the end of a task). `folders.py` pairs rows with the bucket's listing, `audit.py` judges
the differences, `continuous_audit.py` repeats that in the workers, `repair.py` and `rebuild.py` mend them, and
`accepted_losses.py` has what a person gave up.
"""
