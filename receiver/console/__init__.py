"""Room: the console, HTML pages for people. Login and the guard before every page are here, the pages in `pages/`.

It leans on tasks, batch, events and storage, and nothing leans on it. The templates escape every value. Read
`console.py` first (all pages and actions), then `application.py` (the guard), `access.py` (sessions) and one page.
"""
