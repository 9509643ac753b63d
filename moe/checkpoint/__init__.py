"""Saved states: atomic, hashed, by parameter and expert, whatever the layout that wrote them.

`save`, `state`, `proof` and `resume` work on a running engine; the rest needs no DeepSpeed.
"""
