"""The adapters of a saved run -> a folder that `peft` loads onto the stock model (peft 0.21's format).

E experts, r rank, F rows, D columns. What `peft` calls `target_modules` are the attention's matrices; all others are
`target_parameters`: the experts' stacked ones, which no module holds alone, and those of dense MLPs, whose names `peft`
would take for the experts of an older version of `transformers`.
"""

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe.config import RunConfig
from moe.config.lora import LoraConfig, Target
from moe.errors import ExportError
from moe.hf.convert import Move, moves
from moe.hf.match import family_of
from moe.hf.pages import TORCH_NAMES, Dtype, SpecialTokens, config_page, special_tokens
from moe.hf.stream import write_tensors
from moe.sparse.lora import A, B

if TYPE_CHECKING:
    import torch

    from moe.hf.convert import Read

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_ROOT = "base_model.model."
_OUTER = ("down_proj",)
"""Of two stacked parameters in a module, `peft` wraps this one around the other."""


@dataclass(frozen=True)
class WrittenAdapter:
    """What was written."""

    architecture: str
    num_tensors: int
    num_parameters: int
    num_bytes: int
    """Of the weights."""


@dataclass(frozen=True)
class _Place:
    """An adapter of ours and where `peft` has it."""

    ours: str
    target: str
    """What adapter_config.json says, below a layer."""
    is_module: bool
    key: str
    """In the weights' file, without the half's name."""
    rows: "torch.Tensor | None"
    """int64: which rows of B are meant; None: all, of every expert."""


def write_adapter(
    folder: Path,
    run: RunConfig,
    step: int,
    adapted: Collection[str],
    stored: "Read",
    tokenizer: Path,
    *,
    dtype: Dtype = "fp32",
    base: str | None = None,
) -> WrittenAdapter:
    """Write adapter_config.json, adapter_model.safetensors, tokenizer and card into the existing `folder`.

    `adapted` are the logical names that have an adapter, `stored` fetches a half as float32, piece by piece; no more
    than one stacked half is held. `base` is the name or path of the model it belongs on. Raises `ExportError`: no
    stock architecture, one whose weights lie in a way that `peft` cannot be told of, or a name that is not the
    recipe's.
    """
    import torch

    assert run.lora is not None, "checked by moe.export"
    family = family_of(run.model)
    plan = {move.ours: move for move in moves(family, run.model)}
    if unknown := sorted(set(adapted) - plan.keys()):
        raise ExportError(
            f"the saved model has an adapter on {unknown[0]}, which its recipe does not call for. Export it with the "
            f"recipe it was trained with."
        )
    stock = _stock(run, special_tokens(tokenizer))
    places = [place for name in adapted for place in _places(plan[name], stock)]
    kind = getattr(torch, TORCH_NAMES[dtype])
    shapes = {
        key: shape for place in places for key, shape in _shapes(place, plan[place.ours], run.lora.rank)
    }
    planned = {key: (shape, kind) for key, shape in shapes.items()}
    write_tensors(folder / _WEIGHTS, planned, _tensors(places, plan, stored))
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    page = json.dumps(_config(run.lora, places, base), indent=2) + "\n"
    (folder / _CONFIG).write_text(page, encoding="utf-8")
    (folder / "README.md").write_text(_card(run, step, family.architecture, base), encoding="utf-8")
    numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
    size = numbers * kind.itemsize
    return WrittenAdapter(family.architecture, len(shapes), numbers, size)


def _stock(run: RunConfig, tokens: SpecialTokens) -> "Mapping[str, torch.nn.Parameter]":
    """The parameters that stock `transformers` has in memory, without memory."""
    import torch
    import transformers

    family = family_of(run.model)
    page = config_page(family, run.model, tokens, dtype="fp32", load_balancing_weight=0.0)
    with torch.device("meta"):
        model = getattr(transformers, family.architecture)(transformers.AutoConfig.for_model(**page))
    for module in model.modules():
        if getattr(module, "is_transposed", False):
            raise ExportError(
                f"{family.architecture} keeps its experts transposed, and adapters for it are not written yet. "
                f"Export the merged model, without --adapter."
            )
    return dict(model.named_parameters())


def _places(move: Move, stock: "Mapping[str, torch.nn.Parameter]") -> Iterator[_Place]:
    if move.stacked:
        layer = _layer_of(move.disk[0])
        leaf = "gate_up_proj" if move.ours.endswith("gate_up") else "down_proj"
        found = [
            name
            for name, parameter in stock.items()
            if name.startswith(layer) and name.endswith(f".{leaf}") and tuple(parameter.shape) == move.shape
        ]
        if len(found) != 1:
            raise _homeless(move)
        module = found[0].removesuffix(f".{leaf}")
        key = module if leaf in _OUTER else f"{module}.base_layer"
        yield _Place(move.ours, found[0].removeprefix(layer), is_module=False, key=key, rows=None)
        return
    for disk, rows in _rows(move):
        if disk not in stock or tuple(stock[disk].shape) != move.disk_shape:
            raise _homeless(move)
        below, module = disk.removeprefix(_layer_of(disk)), disk.removesuffix(".weight")
        # peft takes a module of this name for an expert's, whose gate and up it fuses.
        is_module = ".attention." in move.ours and not module.endswith(".gate_proj")
        target = below.removesuffix(".weight") if is_module else below
        yield _Place(move.ours, target, is_module, module, rows)


def _rows(move: Move) -> "Iterator[tuple[str, torch.Tensor]]":
    """(disk name, which rows of ours it has); raises `ExportError` unless conversion only deals out rows."""
    import torch

    if move.part[1] > 1:  # one matrix of theirs, two adapters of ours
        raise _homeless(move)
    rows, columns = move.piece_shape
    row_FD = torch.arange(rows, dtype=torch.float32).unsqueeze(1).expand(rows, columns).contiguous()
    column_FD = torch.arange(columns, dtype=torch.float32).expand(rows, columns).contiguous()
    pairs = zip(move.split(0, row_FD), move.split(0, column_FD), strict=True)
    for (disk, which), (_, across) in pairs:
        if not (which == which[:, :1]).all() or not torch.equal(across, column_FD[: len(across)]):
            raise _homeless(move)
        yield disk, which[:, 0].long()


def _shapes(place: _Place, move: Move, rank: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    rows, columns = move.piece_shape
    stack = move.shape[0] if move.stacked else 1
    yield f"{_ROOT}{place.key}.lora_A.weight", (stack * rank, columns)
    yield f"{_ROOT}{place.key}.lora_B.weight", (rows if place.rows is None else len(place.rows), stack * rank)


def _tensors(
    places: list[_Place], plan: Mapping[str, Move], stored: "Read"
) -> "Iterator[tuple[str, torch.Tensor]]":
    """In the order of `_shapes`."""
    import torch

    for place in places:
        yield f"{_ROOT}{place.key}.lora_A.weight", torch.cat(list(stored(place.ours + A)))
        if plan[place.ours].stacked:
            # peft's columns run over ranks and, within a rank, over experts (ParamWrapper.get_delta_weight).
            b_ErF = torch.stack(list(stored(place.ours + B)))
            yield f"{_ROOT}{place.key}.lora_B.weight", b_ErF.permute(1, 2, 0).flatten(1)
        else:
            (b_Fr,) = stored(place.ours + B)
            yield f"{_ROOT}{place.key}.lora_B.weight", b_Fr[place.rows]


def _config(lora: LoraConfig, places: list[_Place], base: str | None) -> dict[str, object]:
    """adapter_config.json; whatever it leaves out has peft's default."""
    alpha = int(lora.alpha) if lora.alpha.is_integer() else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({place.target for place in places if place.is_module}),
        "target_parameters": sorted({place.target for place in places if not place.is_module}),
    }


def counted(run: RunConfig) -> dict[Target, int] | None:
    """How many parameters the run's adapters have, by target; None: all weights are trained."""
    from moe.model.lora import trained

    return None if run.lora is None else trained(run.model, run.lora)


def _card(run: RunConfig, step: int, architecture: str, base: str | None) -> str:
    counts = counted(run)
    assert counts is not None
    rows = "\n".join(f"| {target} | {count:,} |" for target, count in counts.items())
    return _CARD.format(
        base=f"base_model: {base}\n" if base else "",
        name=run.name,
        architecture=architecture,
        step=step,
        rows=rows,
        place=json.dumps(base or "BASE"),
    )


_CARD = """\
---
library_name: peft
{base}---
# {name}

Low-rank adapters (arXiv:2106.09685) for a `{architecture}`, trained for {step:,} steps with turnout. Written for `peft`
0.21 and `transformers` 5, which keeps all experts of a layer in one tensor.

| adapters on | trained parameters |
|---|---|
{rows}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({place}), "PATH")
```
"""


def _layer_of(disk: str) -> str:
    """`model.layers.3.` of a name in it."""
    match = re.match(r"(?:.*?\.)?layers\.\d+\.", disk)
    assert match is not None, "only layers have adapters"
    return match[0]


def _homeless(move: Move) -> ExportError:
    return ExportError(
        f"the adapter on {move.ours} cannot be said in peft's format: the stock model keeps {move.disk[0]} in another "
        f"shape or order. Export the merged model, without --adapter."
    )
