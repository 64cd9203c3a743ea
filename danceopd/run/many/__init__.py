"""What a run does for many teachers (docs/many-teachers.md): which of them has how many rows. Start with `need.py`."""
