"""A folder that stock `transformers` has saved -> our model section, and our tensors piece by piece."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe import log
from moe.checkpoint.unmapped import TensorFile
from moe.config import ModelConfig
from moe.errors import CheckpointError
from moe.hf.convert import Move, moves
from moe.hf.family import Family
from moe.hf.intake import model_of
from moe.hf.match import family_of
from moe.hf.stream import INDEX, SINGLE

if TYPE_CHECKING:
    from torch import Tensor

_IGNORED = ("rotary_emb.inv_freq",)
"""Ends of keys that old releases wrote and nobody reads."""


class HFFolder:
    """The weights of a Hugging Face folder by our logical names; every key of its files is accounted for."""

    def __init__(
        self, path: Path, family: Family, model: ModelConfig, files: dict[str, TensorFile], plan: list[Move]
    ) -> None:
        self.path, self.family, self.model = path, family, model
        self._files, self._moves = files, {move.ours: move for move in plan if not move.copy}

    @classmethod
    def open(cls, path: Path) -> "HFFolder":
        """Raises `CheckpointError`: not such a folder, an architecture or a setting that we have not, a key that is
        missing, unknown or of another shape.
        """
        family, model = model_of(path)
        if family_of(model) is not family:
            # An earlier row equals it too; what it came from, it becomes again.
            model = model.model_copy(update={"architecture": family.model_type})
        files = tensor_files(path)
        plan = moves(family, model)
        if model.prediction_depth and not any(
            _is_prediction(move) and move.disk[0] in files for move in plan
        ):
            # Stock code drops the weights of prediction modules when it saves, and keeps the number.
            log.get().warning(
                f"{path}/config.json: num_nextn_predict_layers is {model.prediction_depth}, but the folder holds no "
                f"weights of prediction modules: the model is read without."
            )
            model = model.model_copy(update={"prediction_depth": 0})
            plan = moves(family, model)
        _account(path, plan, files)
        return cls(path, family, model, files, plan)

    def names(self) -> list[str]:
        """Logical names of parameters, experts of a stacked one counted as one, and of selection biases."""
        return list(self._moves)

    def pieces(self, name: str, only: Sequence[int] | None = None) -> Iterator["Tensor"]:
        """A parameter, float32, on the CPU: whole, or of a stacked one its experts in order, or `only` those."""
        import torch

        move = self._moves[name]
        for number in range(move.num_pieces) if only is None else only:
            parts = [self._read(key, move, number) for key in move.keys(number)]
            yield move.join([part.to(torch.float32) for part in parts]).contiguous()

    def _read(self, key: str, move: Move, number: int) -> "Tensor":
        """What of a disk tensor belongs to a piece."""
        file = self._files[key]
        if move.packed:
            return file.read_rows(key, number, number + 1)
        which, blocks = move.part
        if blocks == 1:
            return file.read(key)
        rows = move.disk_shape[0] // blocks
        return file.read_rows(key, which * rows, (which + 1) * rows)


def tensor_files(path: Path) -> dict[str, TensorFile]:
    """Key -> the file that holds it, by the index or the one file there is; raises `CheckpointError`."""
    weight_map: dict[str, str] = {}
    names = [SINGLE]
    if (path / INDEX).is_file():
        weight_map = _weight_map(path / INDEX)
        names = sorted(set(weight_map.values()))
    elif not (path / SINGLE).is_file():
        raise CheckpointError(
            f"{path} holds neither {SINGLE} nor {INDEX}: weights are read from safetensors alone. Save them as such "
            f"with transformers."
        )
    found: dict[str, TensorFile] = {}
    for name in names:
        if Path(name).name != name or name in ("", ".."):
            raise CheckpointError(
                f"{path / INDEX} names {name!r}: a file beside it is meant. Fetch the folder again."
            )
        file = TensorFile(path / name)
        for key in file.shapes():
            if key in found:
                raise CheckpointError(
                    f"{path}: {key} is in {found[key].path.name} and in {name}. Remove one."
                )
            found[key] = file
    for key, name in weight_map.items():
        if key not in found or found[key].path.name != name:
            raise CheckpointError(
                f"{path / INDEX} says that {key} is in {name}, and it is not: the index belongs to other files. Fetch "
                f"the folder again."
            )
    return found


def _weight_map(path: Path) -> dict[str, str]:
    """Key -> name of a file, as the index has it."""
    try:
        weight_map: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError("its weight_map names no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Fetch the folder again.") from None
    return weight_map


def _account(path: Path, plan: list[Move], files: dict[str, TensorFile]) -> None:
    """Every key is called for, is there, and has its shape; second homes hold what the first does."""
    for move in plan:
        if move.copy and move.disk[0] not in files:
            continue
        for key in move.disk:
            if key not in files:
                raise CheckpointError(
                    f"{path}: {key} is missing, which config.json calls for. Fetch the folder again, whole."
                )
            files[key].check(key)
            found = files[key].shapes()[key]
            if found != move.disk_shape:
                raise CheckpointError(
                    f"{path}: {key} has shape {list(found)}, but config.json makes it {list(move.disk_shape)}. They "
                    f"do not belong together: fetch both again."
                )
    expected = {key for move in plan for key in move.disk}
    unknown = [key for key in files if key not in expected and not key.endswith(_IGNORED)]
    unknown = [key for key in unknown if not _is_tied_head(key, plan)]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"{path} holds {unknown[0]}{more}, which config.json does not call for: what they say would be lost. Mend "
            f"config.json, or remove them."
        )
    _compare_copies(path, plan, files)


def _is_tied_head(key: str, plan: list[Move]) -> bool:
    """Some files hold the embedding a second time as the head."""
    return key == "lm_head.weight" and all(move.ours != "head.weight" for move in plan)


def _compare_copies(path: Path, plan: list[Move], files: dict[str, TensorFile]) -> None:
    first = {move.ours: move.disk[0] for move in plan if not move.copy}
    head, embedding = "lm_head.weight", first["embed.weight"]
    if head in files and _is_tied_head(head, plan) and not _equal(files, head, embedding):
        # Stock code of 5.x then does not tie them.
        raise CheckpointError(
            f"{path}: {head} differs from {embedding}, but config.json ties them (tie_word_embeddings). Set that to "
            f"false, or remove {head}."
        )
    for move in plan:
        if move.copy and (key := move.disk[0]) in files and not _equal(files, key, first[move.ours]):
            raise CheckpointError(
                f"{path}: {key} differs from {first[move.ours]}, and the prediction module here shares it. "
                f"Remove the module: set num_nextn_predict_layers to 0 and drop its keys."
            )


def _equal(files: dict[str, TensorFile], key: str, other: str) -> bool:
    """Whether two tensors are; of another shape they are not."""
    import torch

    return torch.equal(files[key].read(key), files[other].read(other))


def _is_prediction(move: Move) -> bool:
    return move.ours.startswith("predictions.")
