"""Room: batches. Thousands of lines from a file become task rows, each sent once however often it is submitted.

It leans on `receiver.tasks`. Read `batch_file.py` first (JSONL, CSV and their faults), then `batch.py` (the rows of a
batch); `batch_view.py` and `batch_report.py` are what `batch status` and `batch export` show.
"""
