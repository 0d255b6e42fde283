"""Room: small copies of archived pictures for the console's pages.

Read `thumbnails.py` first: what is made, kept and bounded. `decoder.py` starts the process that decodes, and ends it;
`decode.py` is that process.
"""
