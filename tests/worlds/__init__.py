"""A package, so that pytest does not take its conftest.py for the one above."""
