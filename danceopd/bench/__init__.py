"""Benchmarks: a student against its teachers, its base and LoRA blends, on the same items from the same noise.

In: a student (run folder, LoRA or pipeline), a suite, and for some suites a judge. Out: a folder with the images,
scores.json, samples.jsonl and report.html. `compare` puts two finished folders side by side.
Read run.py first (`Bench`: the steps in order), then lineup.py (the models), generate.py (the images), scoring.py (the
scores), statistics.py (means, intervals, paired differences), results.py (scores.json).
"""
