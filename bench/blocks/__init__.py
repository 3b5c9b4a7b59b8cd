"""What the marked blocks of the pages hold, a module a subject; `pages.py` writes them.

A module has `BLOCKS`, name -> function without arguments that returns Markdown made of the rows in
`bench/results` and `bench/quality/runs`. `text.py` is the printer of tables that benches and pages
share.
"""
