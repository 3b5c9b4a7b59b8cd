"""Experimental: a new support in the middle of training (`refresh`), or a part of the one there is
(`narrow`).

refresh.py narrow.py   the two verbs
conditions.py          which adapters can be
freeze.py              R_f R as one frozen factor
optimizer_state.py     the optimiser's moments in another basis
"""
