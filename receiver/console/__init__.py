"""Room: the console, HTML pages for people. Login and the guard before every page are here, the pages in `pages/`.

It leans on tasks, batch, events and storage, and nothing leans on it. The templates escape every value. Read
`console.py` first (all pages and actions), then `application.py` (the guard), `access.py` (sessions) and one page.

No admin library: starlette-admin and sqladmin bring jQuery and Tabler, with inline script and style that the
Content-Security-Policy forbids. Both keep a session of their own beside ours, and page by offset with a count over the
table. Their plain tables are the smallest part of these pages.
"""
