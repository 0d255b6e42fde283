"""Rows and objects: everything that is stored. Knows no web framework, no provider, and nothing of `receiver`.

Rooms, each leaning on those below it: operations, thumbnails; archive; fetch, bucket, accounts; rows; database. At the
root are modules that every room may use: `errors` (the error tree), `states` (states and their ranks), `keys` (object
keys), `circuit` (circuit breaker), `background` (a thread beside a block), `egress` (a proxy as the way out),
`url_parts` (URLs of settings), `own_files` and `local_folder` (files and folders beside those of other users). Read
`states.py` and `errors.py` first.
"""
