"""Kill training at random moments, saves included, and start it again: `python -m tests.e2e.chaos --kills 50`.

Each life is two real ranks of `moe.train` (forked, so that the imports are paid once). A rank chosen at random
gets SIGKILL, after a random delay or at a random call within a save, and the rest what a launcher would do to them.
What stands on the disk then must verify, file by file and tensor by tensor; the same command must go on from it;
and every run that reaches its end must have the weights and moments of the run that nobody disturbed, to the bit.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import yaml

import moe.checkpoint.resume
import moe.checkpoint.save
import moe.engine.engine  # noqa: F401  loaded before ranks are forked
from launch.port import free_port
from moe import train
from moe.checkpoint import folder as folders
from moe.checkpoint import tensors
from moe.errors import clean_exit
from tests.unit.corpus import raw_data

RANKS, STEPS = 2, 24
RECIPE: dict[str, Any] = {
    "name": "chaos",
    "seed": 7,
    "model": {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_layers": 2,
        "max_sequence_length": 64,
        "attention": {"num_heads": 4, "num_kv_heads": 2},
        "moe": {"num_experts": 8, "top_k": 2, "expert_intermediate_size": 64, "selection_bias": True},
    },
    "data": {"sequence_length": 16},
    "train": {
        "steps": STEPS,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "precision": "fp32",
        "optimizer": {"learning_rate": 1e-3},
    },
    "parallel": {"expert_parallel_size": 2, "timeout_minutes": 1.0},
    "balance": {"bias_update_rate": 0.01},
    "checkpoint": {"every_steps": 1, "keep": 2},
    "logging": {"peak_tflops": 1.0},
}


Say = Callable[[str], None]


@dataclass
class Tally:
    """What has happened."""

    kills: int = 0
    within_saves: int = 0
    """Kills of a rank by itself, at a call of the thread that writes."""
    lives: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    """Of kills, by what they left behind."""
    runs: int = 0
    """That reached their end and were equal to the undisturbed one."""


def chaos(folder: Path, kills: int, seed: int, say: Say, *, asynchronous: bool = True) -> Tally:
    """Kill `kills` times; raises AssertionError for anything that is not as promised."""
    draw, tally = random.Random(seed), Tally()
    recipe, straight = _place(folder, asynchronous), folder / "straight"
    for name in ("first", "straight"):
        began = time.monotonic()
        _end(_start(recipe, folder / name, {}), folder / name)
        _import_what_it_did(folder / name)
    assert _state(folder / "first") == _state(straight)
    seconds, state, losses = time.monotonic() - began, _state(straight), _losses(straight)
    assert len(losses) == STEPS
    say(f"seed {seed}: undisturbed, {STEPS} steps on {RANKS} ranks took {seconds:.1f} s")
    while tally.kills < kills:
        run = folder / f"run-{tally.runs + 1}"
        while not (run / "done").is_file():
            tally.lives += 1
            _life(recipe, run, draw, seconds, tally, say, kills)
            _verify(run)
        found = _state(run)
        assert found == state, f"{run}: {[key for key in state if found.get(key) != state[key]][:3]} differ"
        assert _losses(run) == losses
        tally.runs += 1
        say(f"run {tally.runs} has reached its end: {len(state)} tensors and {STEPS} losses equal to the bit")
    return tally


def _place(folder: Path, asynchronous: bool) -> Path:
    """Data and a recipe."""
    draw = random.Random(1)
    documents = [[*(draw.randrange(2, 300) for _ in range(40)), 0] for _ in range(60)]
    data = raw_data(folder / "data", {"train": documents}, vocab_size=300)
    data.tokenizer_folder.mkdir()
    page = {**RECIPE, "data": {**RECIPE["data"], "path": str(data.folder)}}
    page["checkpoint"] = {**RECIPE["checkpoint"], "asynchronous": asynchronous}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(page))
    return recipe


def _life(
    recipe: Path, run: Path, draw: random.Random, seconds: float, tally: Tally, say: Say, kills: int
) -> None:
    """One start, ended by a kill, or by itself if it must or was faster."""
    newest, born, disturb = _newest(run), time.time(), tally.kills < kills
    kind = draw.choices(("early", "any", "save"), (2, 3, 5))[0]
    if not tally.within_saves and tally.kills + 1 == kills:
        kind = "save"  # one at least, however the draws and the machine's speed fall out
    victim, progress, share = draw.randrange(RANKS), draw.randrange(1, 6), draw.random()
    trap = Trap(progress, share) if disturb and kind == "save" else None
    ranks = _start(recipe, run, {victim: trap} if trap else {})
    if disturb:
        if kind == "early":  # while ranks meet, restore, take their first steps
            _wait(ranks, seconds=share * seconds)
        else:
            _wait(ranks, until=lambda: _newest(run) >= newest + progress and trap is None)
        if kind == "any":
            _wait(ranks, seconds=share * 0.2)
    trapped = ranks[victim].exitcode == -signal.SIGKILL
    if not disturb or not (trapped or _all_alive(ranks)):
        return _end(ranks, run)
    _kill(ranks, victim, draw)
    tally.kills += 1
    tally.within_saves += trapped
    left = _left(run, born)
    tally.moments[left.partition(" of")[0]] += 1
    how = f"at {100 * share:.0f} % of save {progress + 1}" if trapped else "from outside"
    say(f"kill {tally.kills}: rank {victim}, {how}; step {newest} -> {_newest(run)}; left {left}")
    return None


class Trap:
    """A profiler that kills its own process in a save: at the call that is `share` of those of the save before."""

    def __init__(self, after: int, share: float) -> None:
        self.after, self.share = after, share
        self.calls: Counter[int] = Counter()
        """By thread; each save has one."""

    def __call__(self, *_: object) -> None:
        thread = threading.current_thread()
        if thread.name != "checkpoint":
            return
        mine = thread.native_id or 0
        self.calls[mine] += 1
        saves = list(self.calls)
        if len(saves) > self.after and self.calls[mine] >= self.share * self.calls[saves[-2]]:
            os.kill(os.getpid(), signal.SIGKILL)


def _start(recipe: Path, run: Path, traps: Mapping[int, Trap]) -> list[BaseProcess]:
    port = free_port("127.0.0.1")
    context = multiprocessing.get_context("fork")
    ranks: list[BaseProcess] = [
        context.Process(target=_rank, args=(rank, port, recipe, run, (traps or {}).get(rank)), daemon=True)
        for rank in range(RANKS)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def _rank(rank: int, port: int, recipe: Path, run: Path, trap: Trap | None) -> None:
    """What a launcher would have started as `python -m moe.train RECIPE run_dir=RUN`."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    said = os.open(_log(run, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if trap is not None:
        threading.setprofile(trap)
    with clean_exit(speak=rank == 0):
        code = train.main(recipe, [f"run_dir={run}"])
        _log(run, rank).with_suffix(".modules").write_text("\n".join(sys.modules))
        sys.exit(code)


def _import_what_it_did(run: Path) -> None:
    """What ranks import on the way, such as torch's compiler, takes them longer than all of a life's training."""
    for name in _log(run, 0).with_suffix(".modules").read_text().split():
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _kill(ranks: list[BaseProcess], victim: int, draw: random.Random) -> None:
    """The victim without warning; the others asked first, as launchers do, then at once."""
    ranks[victim].kill()
    time.sleep(draw.uniform(0, 0.05))
    for rank in ranks:
        rank.terminate()
    for rank in ranks:
        rank.join(draw.uniform(0, 0.3))
        rank.kill()
        rank.join()


def _end(ranks: list[BaseProcess], run: Path) -> None:
    """Ranks that nobody kills must end well."""
    for rank in ranks:
        rank.join(180)
    codes = [rank.exitcode for rank in ranks]
    said = "".join(_log(run, rank).read_text() for rank in range(RANKS))
    assert codes == [0] * RANKS, f"exit codes {codes}:\n{said}"


def _wait(ranks: list[BaseProcess], until: Callable[[], bool] | None = None, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while _all_alive(ranks) and time.monotonic() < end and not (until and until()):
        time.sleep(0.0002)


def _all_alive(ranks: list[BaseProcess]) -> bool:
    return all(rank.is_alive() for rank in ranks)


def _verify(run: Path) -> None:
    """Everything with the name of a checkpoint is one, to the last tensor."""
    for step in folders.steps(run):
        folder = folders.step_folder(run, step)
        manifest = folders.read_manifest(folder)
        folders.verify(folder, manifest)
        assert tensors.verify(folder, manifest) == len(manifest.tensors)


def _state(run: Path) -> dict[str, str | None]:
    _verify(run)
    manifest = folders.read_manifest(folders.step_folder(run, STEPS))
    return {key: saved.xxh3 for key, saved in manifest.tensors.items()}


def _losses(run: Path) -> list[tuple[int, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines) if "loss" in record]


def _newest(run: Path) -> int:
    names = [path.name for path in (run / "checkpoints").glob("step_*")]
    return max((int(name.removeprefix("step_")) for name in names), default=0)


def _left(run: Path, born: float) -> str:
    """What a life left half done."""
    newest = _newest(run)
    for path in (run / "checkpoints").glob(".torn-*"):
        if path.stat().st_ctime >= born:
            step = int(path.name.removeprefix(".torn-step_"))
            return f"a torn {'save' if step > newest else 'removal'} of step {step}"
    return "nothing half done"


def _log(run: Path, rank: int) -> Path:
    return run.with_name(f"{run.name}-rank-{rank}.log")


def _print(sentence: str) -> None:
    sys.stdout.write(sentence + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--waiting", action="store_true", help="with checkpoint.asynchronous=false")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = chaos(Path(folder), options.kills, options.seed, _print, asynchronous=not options.waiting)
    moments = ", ".join(f"{count} left {moment}" for moment, count in tally.moments.most_common())
    _print(
        f"{tally.kills} kills, {tally.within_saves} of them within a save, in {tally.lives} lives ({moments}): "
        f"every start went on from a checkpoint that verifies, "
        f"and {tally.runs} of {tally.runs} runs ended equal to the bit; {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
