"""Room: the command line. One module for each group of commands; `main.py` lists them and prints errors.

It may lean on every room. A command imports what it needs when it runs, so that `--help` answers quickly. Read
`main.py` first, then `opening.py` (how a command opens database and store), `options.py` (what several commands have)
and `terminal.py` (all output).
"""
