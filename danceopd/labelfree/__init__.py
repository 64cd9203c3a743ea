"""Optional, and without labels: targets that go past a teacher, gates, and a monitor of confident mistakes.

`contrast.py` moves the teachers' velocities away from a reference's. `gates/` weighs the teachers' answers.
`monitor.py` is the monitor's `Callback`: held-out probes (`probes.py`), a judge that no training uses (`scorers.py`),
and limits (`statistics.py`). docs/labelfree.md has the equations. Read `contrast.py` first.
"""
