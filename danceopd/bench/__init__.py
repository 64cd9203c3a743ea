"""Measure a student: suites of tasks with exact or judged scores, against its teachers, its base and a blend."""
