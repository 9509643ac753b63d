"""Saved states: atomic, hashed, by parameter and expert, whatever the layout that wrote them.

`read` and `identity` need no DeepSpeed; `save` and `resume` work on a running engine.
"""
