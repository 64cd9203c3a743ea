"""Gates: re-weightings of the teachers' answers, as the trainer's one `QueryHook`.

`hook.py` queries frozen fields under other conditions (`context.py`, from data that `variants.py` makes) and turns the
answers into row weights, token weights and targets (`weights.py`, with the formulas of `evidence.py`, `consensus.py`
and `skills.py`). `cost.py` counts the forwards. Read `hook.py` first.
"""
