"""Capabilities of any S3 store, and our own promises on top of it: `python -m tests.conformance`."""
