"""A recipe -> a data folder by way of stages: text, marks, verdicts, tokenizer, encode; each begins on a whole one.

Where there is a tokenizer, the stages that mark and encode read the text themselves, which is then written nowhere;
unless a file is so large that its parts had better be shared, or the text would be cleaned twice, which takes longer.

The folder NAME.stages beside the output holds what the stages made, so that a run that was stopped goes on from there.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import assemble, claim, executors, output, records, vocabulary
from data_prep.documents import Source, nothing_left
from data_prep.encode import Encode, MakeTokenizer, Part, ReadAndEncode
from data_prep.encoding import Encoding
from data_prep.marks import Mark, TestRuns
from data_prep.parts import PartFacts
from data_prep.paths import matches
from data_prep.prepare import summarise, up_to_date
from data_prep.recipe import DataRecipe, ExistingTokenizer
from data_prep.records import Facts, Record, Unit
from data_prep.texts import ReadAndClean, open_sources, portions
from data_prep.verdicts import Judge
from moe import log
from moe.data.shards import FileStamp, SourceFacts, TokenData
from moe.errors import DataError

STAGES = ("text", "tests", "marks", "verdicts", "tokenizer", "encode")
_FORMAT = 4
_LARGE_PARTS = 4
"""A file of more parts than these is cut into them before they are encoded."""


class _Enough(Exception):  # noqa: N818  no error: the stage that was asked for is done
    """Nothing more was asked for."""


@dataclass(frozen=True)
class Asked:
    """What to do of a recipe: all, `stage` alone, or with `dry_run` only to tell what would be done."""

    overwrite: bool = False
    stage: str | None = None
    dry_run: bool = False
    say: Callable[[str], None] = print


def prepare(recipe: DataRecipe, asked: Asked) -> TokenData | None:
    """As `data_prep.prepare.prepare`; None where not all was asked for."""
    with output.errors_of_the_disk(recipe.folder):
        return _prepare(recipe, asked)


def _prepare(recipe: DataRecipe, asked: Asked) -> TokenData | None:
    sources = open_sources(recipe)
    times = [source.times() for source in sources]
    stamps = [source.stamps() for source in sources]
    digests = [source.digest(found) for source, found in zip(sources, stamps, strict=True)]
    tokenizer = recipe.tokenizer
    ready = vocabulary.load(tokenizer) if isinstance(tokenizer, ExistingTokenizer) else None
    if not (asked.overwrite or asked.stage) and up_to_date(recipe, digests, ready):
        log.get().info("%s is up to date: nothing to do", recipe.folder)
        return TokenData.open(recipe.folder, verify=False)
    work = recipe.stages_folder
    with ExitStack() as stack:
        if not asked.dry_run:
            work.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(output.locked(work))
        page = claim.page(recipe, digests, ready.files if ready else ())
        is_anew = claim.claim(work, page, overwrite=asked.overwrite, look=asked.dry_run)
        at_work = stack.enter_context(executors.workers(recipe.executor))
        run = _Run(recipe, work, records.key(_FORMAT, page["versions"]), asked, at_work, is_anew)
        try:
            made = run.all(sources, stamps)
        except _Enough:
            return None
        if asked.dry_run:
            asked.say(f"all stages are done: {recipe.folder} is to be put together of what they made")
            return None
        for source, before, stamp in zip(sources, times, stamps, strict=True):
            source.check_unchanged(before, stamp)
        with output.workspace(recipe.folder, replace=asked.overwrite) as folder:
            names = [source.name for source in sources]
            manifest = assemble.assemble(recipe, list(zip(names, digests, strict=True)), made, folder)
    summarise(manifest, recipe.folder)
    return TokenData.open(recipe.folder, verify=False)


@dataclass
class _Run:
    """The stages of one recipe, in order; `step` does one."""

    recipe: DataRecipe
    work: Path
    key: str
    asked: Asked
    workers: executors.Workers
    is_anew: bool
    """Whether what is there is of another recipe, and to go."""

    def all(self, sources: Sequence[Source], stamps: Sequence[dict[str, FileStamp]]) -> assemble.Made:
        """Raises `_Enough` where the stage that was asked for is done."""
        work, owners = self._portions(sources, stamps)
        if self._is_straight([read for _, read in work]):
            return self._straight(work, owners)
        text, texts = self.step("text", work)
        accounts = [SourceFacts.model_validate(record.facts["account"]) for record in texts]
        if not sum(account.kept.documents for account in accounts):
            raise nothing_left(accounts)
        files = [
            (unit.folder / part.name, part, record.files[part.name], owner)
            for unit, record, owner in zip(text, texts, owners, strict=True)
            for part in (PartFacts.model_validate(page) for page in record.facts["parts"])
        ]
        verdicts = self._verdicts([path for path, *_ in files], [stamp for *_, stamp, _ in files])
        parts = [
            Part(path, verdicts[0].folder / f"{number:05d}.npy" if verdicts else None)
            for number, (path, *_) in enumerate(files)
        ]
        upstream = [stamp.xxh3_128 for *_, stamp, _ in files], verdicts[1].files if verdicts else None
        return self._encode(parts, [owner for *_, owner in files], upstream, text, texts, owners)

    def step(
        self, stage: str, work: Sequence[tuple[Callable[[Path], Facts], Any]]
    ) -> tuple[list[Unit], list[Record]]:
        """Do what is missing of a stage of (work, what it reads); pass only if then every byte of it is whole."""
        units = [
            Unit(
                self.work / stage, f"{number:05d}", records.key(self.key, stage, repr(do), _plain(reads)), do
            )
            for number, (do, reads) in enumerate(work)
        ]
        if self.asked.dry_run:
            todo = [unit for unit in units if self.is_anew or records.finished(unit) is None]
            then = f"; then {', '.join(self._after(stage))}" if todo and self._after(stage) else ""
            self.asked.say(f"{stage}: {len(units)} parts, {len(units) - len(todo)} of them done{then}")
            if todo:
                if plan := self.workers.plan(todo):
                    self.asked.say(plan)
                raise _Enough
        elif self.asked.stage in (None, stage):
            log.get().info("%s: %d parts", stage, len(units))
            again = executors.run(units, self.workers)
            if again < len(units):
                log.get().info("%s: %d parts were there already", stage, len(units) - again)
        found = records.gate(units)
        if self.asked.stage == stage:
            raise _Enough
        return units, found

    def _after(self, stage: str) -> list[str]:
        """The stages of this recipe that follow."""
        skipped = {
            "tests": self.recipe.decontaminate is None,
            "marks": not self.recipe.is_judged,
        }
        skipped["verdicts"] = skipped["marks"]
        return [name for name in STAGES[STAGES.index(stage) + 1 :] if not skipped.get(name)]

    def _portions(
        self, sources: Sequence[Source], stamps: Sequence[dict[str, FileStamp]]
    ) -> tuple[list[tuple[ReadAndClean, list[FileStamp]]], list[int]]:
        """Units of reading, each with the files that it reads; and the number of the source of each."""
        size = self.recipe.part_megabytes * 10**6
        work, owners = [], []
        for number, (config, source) in enumerate(zip(self.recipe.sources, sources, strict=True)):
            for portion, files in portions(config, source, size):
                do = ReadAndClean(portion, self.recipe.clean, self.recipe.bad_rows == "quarantine", size)
                work.append((do, [stamps[number][str(path)] for path in files]))
                owners.append(number)
        return work, owners

    def _is_straight(self, reads: Sequence[Sequence[FileStamp]]) -> bool:
        recipe = self.recipe
        limit = _LARGE_PARTS * recipe.part_megabytes * 10**6
        return (
            isinstance(recipe.tokenizer, ExistingTokenizer)
            and not (recipe.is_judged and (recipe.clean is not None or recipe.reads_html))
            and all(files and sum(file.bytes for file in files) <= limit for files in reads)
        )

    def _straight(
        self, work: Sequence[tuple[ReadAndClean, list[FileStamp]]], owners: Sequence[int]
    ) -> assemble.Made:
        if self.asked.stage == "text":
            raise DataError(
                f"--stage text: this recipe has a tokenizer, so its text is written nowhere; the stages that follow "
                f"read it themselves. Use --stage {self._after('text')[0]} first."
            )
        reads = [read for _, read in work]
        verdicts = self._verdicts([do for do, _ in work], reads)
        tokenizer, tokens, encoding = self._tokenizer((), reads)
        encode = []
        for number, (do, read) in enumerate(work):
            name = f"{number:05d}.npy"
            judged = (verdicts[0].folder / name, verdicts[1].files[name]) if verdicts else (None, None)
            encode.append((ReadAndEncode(do, encoding, judged[0]), [read, tokens.files, judged[1]]))
        units, found = self.step("encode", encode)
        made = list(zip(units, found, owners, strict=True))
        return assemble.Made(tokenizer, tokens, made, made)

    def _verdicts(
        self, texts: Sequence[Path | ReadAndClean], reads: Sequence[Any]
    ) -> tuple[Unit, Record] | None:
        """Of the documents of parts, or of what is read of sources."""
        tests = self.recipe.decontaminate
        if not self.recipe.is_judged:
            if self.asked.stage in ("tests", "marks", "verdicts"):
                raise DataError(
                    f"--stage {self.asked.stage}: the recipe has neither duplicates nor decontaminate. Leave it out."
                )
            return None
        runs, tests_read = None, None
        if tests is not None:
            paths = matches(tests.paths)
            do = TestRuns(paths, tuple(tests.fields), tests.words)
            (unit,), (record,) = self.step("tests", [(do, [FileStamp.of(path) for path in paths])])
            runs_of, count, short = (record.facts[name] for name in ("runs", "texts", "too short"))
            log.get().info(
                "decontaminate: %s runs of %d words in %s test texts, %s of them shorter than that",
                f"{runs_of:,}",
                tests.words,
                f"{count:,}",
                f"{short:,}",
            )
            runs, tests_read = unit.folder / "runs.npy", record.files["runs.npy"]
        words = tests.words if tests else 0
        marks, marked = self.step(
            "marks",
            [
                (Mark(text, self.recipe.duplicates, runs, words), [read, tests_read])
                for text, read in zip(texts, reads, strict=True)
            ],
        )
        judge = Judge(
            tuple(unit.folder for unit in marks),
            tuple(record.facts["documents"] for record in marked),
            tuple(f"{number:05d}" for number in range(len(marks))),
        )
        (unit,), (record,) = self.step("verdicts", [(judge, [record.files for record in marked])])
        if (read := sum(judge.documents)) and read == sum(record.facts.values()):
            found = ", ".join(f"{count:,} {reason}" for reason, count in record.facts.items() if count)
            raise DataError(
                f"none of {read:,} documents stays: {found}. Check decontaminate: are the sources its tests?"
            )
        return unit, record

    def _encode(
        self,
        parts: Sequence[Part],
        owners_of_parts: Sequence[int],
        upstream: Any,
        text: Sequence[Unit],
        texts: Sequence[Record],
        owners: Sequence[int],
    ) -> assemble.Made:
        of_sources = tuple(
            (
                f"source {number}",
                tuple(p for p, of in zip(parts, owners_of_parts, strict=True) if of == number),
            )
            for number in range(len(self.recipe.sources))
        )
        tokenizer, tokens, encoding = self._tokenizer(of_sources, upstream)
        encoded, ended = self.step(
            "encode", [(Encode(part, encoding), [upstream, tokens.files]) for part in parts]
        )
        return assemble.Made(
            tokenizer, tokens, list(zip(text, texts, owners, strict=True)),
            list(zip(encoded, ended, owners_of_parts, strict=True)),
        )  # fmt: skip

    def _tokenizer(
        self, of_sources: tuple[tuple[str, tuple[Part, ...]], ...], upstream: Any
    ) -> tuple[Unit, Record, Encoding]:
        recipe = self.recipe
        (unit,), (made,) = self.step("tokenizer", [(MakeTokenizer(recipe.tokenizer, of_sources), upstream)])
        encoding = Encoding(
            unit.folder, made.facts["eos_token"], made.facts["pad_token"],
            recipe.tokenizer.fast, recipe.validation, recipe.shard_tokens,
        )  # fmt: skip
        return unit, made, encoding


def _plain(reads: Any) -> Any:
    """What a unit reads, as JSON."""
    if isinstance(reads, FileStamp):
        return reads.xxh3_128
    if isinstance(reads, dict):
        return {name: _plain(value) for name, value in reads.items()}
    if isinstance(reads, list | tuple):
        return [_plain(value) for value in reads]
    return reads
