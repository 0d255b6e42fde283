"""Rows and objects: everything that is stored. Knows no web framework, no provider, and nothing of `receiver`.

Rooms, each leaning on those below it: operations, thumbnails; archive; fetch, bucket, accounts; rows; database. At the
root are what every room may use, the room `http` (a client) and modules: `errors` (the error tree), `states` (states
and their ranks), `keys` (object keys), `filters` (of lists, as an address has them), `circuit` (circuit breaker),
`background` (a thread beside a block), `forks` (what a forked child may not share), `spool` (a file on its way to the
store), `own_files` and `local_folder` (files and folders beside those of other users), `url_parts` (secrets in URLs),
`egress` (a proxy as the way out), `gzip_members` and `http_date` (what other hosts send). Read `states.py` and
`errors.py` first.
"""
