"""Executes the chapters, renders the book; knows nothing of models or torch.

`chapters` finds them, `closure` follows their imports, `freshness` decides which are
stale, `execute` runs those, `render` makes the pages, `cli` is the mmsa-book command.
"""
