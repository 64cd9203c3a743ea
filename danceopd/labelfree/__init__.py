"""Optional, and without labels: gates that weigh the teachers' answers, and a monitor of confident mistakes.

`hook.py` is the gates' one `QueryHook`: it queries frozen fields under other conditions (`context.py`, from data that
`variants.py` makes) and turns the answers into row weights, token weights and targets (`weights.py`, with the formulas
of `evidence.py`, `consensus.py` and `skills.py`). `monitor.py` is the monitor's `Callback`: held-out probes
(`probes.py`), a judge that no training uses (`scorers.py`), and limits (`statistics.py`). docs/labelfree.md has the
equations. Read `hook.py` first.
"""
