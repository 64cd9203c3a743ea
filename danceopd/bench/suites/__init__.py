"""The benchmark suites: what is asked, and how an image becomes a score.

In: a suite's name and, where it needs any, its data. Out: items (prompts and edits), and a score for each image, by the
suite itself (scenes, openmoji) or by a judge (gedit, imgedit, geneval, folder).
Read protocol.py first (the contract), then scenes.py (an exact suite) or gedit.py (a judged one).
"""
