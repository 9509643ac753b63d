"""Names and files of the outside world: stock architectures, their folders, their loaders.

`from_pretrained` and `save_pretrained` are for use in Python; `import moe.hf.auto` makes `transformers` know ours.
"""

from moe.hf.library import from_pretrained, save_pretrained

__all__ = ["from_pretrained", "save_pretrained"]
