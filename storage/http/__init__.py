"""HTTP/1.1 as a client: to the hosts of result files and to the store, over kept connections with bounds on all that
comes. Knows no addresses and no files.
"""
