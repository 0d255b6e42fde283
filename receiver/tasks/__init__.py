"""Room: tasks. From a request to its result: submitting, callbacks, reads at the provider, operators' commands.

It leans on `receiver.providers` and storage, and writes rows through `storage.rows.tasks`. Read `submit.py` first, then
`create_step.py` (the create at the provider) and `apply_deliveries.py` (what a callback changes).
"""
