"""Optional, and without labels: targets that go past a teacher, ranked own samples, gates, and a monitor.

`contrast.py` moves the teachers' velocities away from a reference's. `nft/` learns from the student's own samples as
`rewards/` rank them, and `audit/` says whether they rank. `gates/` weighs the teachers' answers.
`monitor.py` is the monitor's `Callback`: held-out probes (`probes.py`), a judge that no training uses (`scorers.py`),
and limits (`statistics.py`). docs/labelfree.md and docs/gates.md have the equations. Read `contrast.py` first.
"""
