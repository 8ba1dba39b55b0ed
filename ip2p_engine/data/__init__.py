"""Data sets of edits on disk: shards, ledger, layouts, copies, sheets."""
