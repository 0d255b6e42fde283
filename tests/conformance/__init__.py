"""What we build on, asked of any S3 store, and what we promise, tried on top of it: `python -m tests.conformance`."""
