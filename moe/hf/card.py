"""A run -> README.md beside its weights: what the model is, what it was trained on and how, and how to load it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe import recipe
from moe.config import RunConfig
from moe.hf.family import Family
from moe.hf.pages import TORCH_NAMES, Dtype


@dataclass(frozen=True)
class Facts:
    """What a card says that the recipe does not know; empty: it says nothing of it."""

    data: str = ""
    """The fingerprint of the data's manifest."""
    evaluation: Mapping[str, Any] | None = None
    """A record of metrics.jsonl."""
    certified: str = ""
    """What the run's certificate says."""


def card(family: Family, run: RunConfig, step: int, dtype: Dtype, facts: Facts) -> str:
    """README.md: what the model is, what it was trained on and how, and how to load it."""
    from moe.model.count import count

    counted = count(run.model, run.data.sequence_length)
    batch = run.train.global_batch_size * run.data.sequence_length
    rows = {
        "architecture": f"`{family.architecture}`",
        "parameters": f"{counted.total_parameters:,}",
        "layers, width": f"{run.model.num_layers}, {run.model.hidden_size}",
        "training": f"{step:,} steps, {step * batch:,} tokens ({batch:,} a step)",
        "weights": TORCH_NAMES[dtype],
    }
    if (moe := run.model.moe) is not None:
        rows["experts"] = (
            f"{moe.num_experts} in each of {len(run.model.sparse_layers)} layers, {moe.top_k} a token"
        )
    if facts.data:
        rows["data"] = f"`{Path(run.data.path).name}`, manifest `{facts.data}`"
    if (seen := facts.evaluation) is not None:
        rows["evaluation"] = (
            f"{seen['bits_per_byte']:.4f} bits per byte, {seen['validation_loss']:.4f} nats per token held out, "
            f"at step {seen['step']:,}"
        )
    if facts.certified:
        rows["certificate"] = facts.certified
    # The data folder's place on somebody's disk is nobody else's business.
    begin = run.init_from and Path(run.init_from).name
    data = run.data.model_copy(update={"path": Path(run.data.path).name})
    public = run.model_copy(update={"run_dir": None, "init_from": begin, "data": data})
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return _CARD.format(name=run.name, table=table, origin=_origin(run), recipe=recipe.dump(public).rstrip())


def _origin(run: RunConfig) -> str:
    begin = "random weights" if run.init_from is None else f"the weights of `{Path(run.init_from).name}`"
    how = "" if run.lora is None else f", by adapters of rank {run.lora.rank}, merged"
    return f"{begin} with turnout{how}"


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

Trained from {origin}.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

## Recipe

```yaml
{recipe}
```
"""
