"""Executes the chapters, renders the book; knows nothing of models or torch.

`chapters` finds them, `closure` follows their imports, `freshness` decides which are
stale, `execute` runs those, `render` makes the pages, `cli` is the mmsa-book command.

Before a page is shown, `gates` calls what checks a chapter: `outputs` its cells and
`prose` its text, with `shelf` for the records and `reading` for what a reader sees of
HTML; `pages` checks the rendered book. A sweep is planned (`planning`), done task by
task (`sweep`) on an engine (`engines`) that starts a `runner`, and its records are
merged and shown (`collect`).
"""
