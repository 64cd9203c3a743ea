"""Evidence beside the scores: the worst items and words by name, drift and diversity, a second judge, votes of people.

In: rows and images of a bench. Out: plain JSON for `scores.json`, `compare.json` and the pages. Nothing here counts in
a score. Read worst.py first.
"""
