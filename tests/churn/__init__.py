"""`make churn`: adapters that change while they are served, against a reference that was read quietly.

contents.py makes the adapters' contents, reference.py their golden texts on a server that nobody disturbs; files.py and
changes.py overwrite, replace, truncate, remove, unload and load; callers.py asks, freezes and leaves; grammars.py has
requests whose text needs no reference; faults.py kills and stops; history.py knows what a name held when, and judges
every reply; run.py keeps what came of it; watch.py has the process and its memory.
"""
