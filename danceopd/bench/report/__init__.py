"""The report of a finished bench: report.html, the tables beside it, and the table in the terminal.

In: a bench folder (scores.json, samples.jsonl, images/) and nothing else. Out: report.html, scores.csv, scores.md,
scores.tex. Read report.py first, then verdict.py (did anything get worse?).
"""
