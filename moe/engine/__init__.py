"""Training through DeepSpeed; with `moe.checkpoint` the only rooms that know it.

`ds_config` loads without it; `engine` and `groups` import it.
"""
