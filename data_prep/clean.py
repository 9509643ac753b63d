"""A document -> the document as it is kept, or the reason why it is not; each on its own."""

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep import urls
from data_prep.documents import Document, Dropped, from_text
from data_prep.normalise import Normaliser
from data_prep.treatment import Clean, LanguageFilter, Rules
from moe.errors import DataError

LONG = "longer than clean.max_megabytes"
LANGUAGE = "another language"

Step = Callable[[str], "str | Refused"]
Cleaner = Callable[[Document], Document | Dropped]


class Refused(str):
    """Why a text is dropped."""

    __slots__ = ()


def cleaner(config: Clean | None) -> Cleaner:
    """Raises `DataError` if a library or a model that a step needs is not on this machine."""
    if config is None:
        return lambda document: document
    refuse = urls.refuser(config.urls) if config.urls is not None else None
    steps = _steps(config)
    longest = config.max_megabytes * 10**6

    def clean(document: Document) -> Document | Dropped:
        if document.num_bytes > longest:
            return Dropped(LONG, document.num_bytes)
        if refuse is not None and (reason := refuse(document.url)):
            return Dropped(reason, document.num_bytes)
        now: Document | Dropped = document
        for step in steps:
            assert isinstance(now, Document)
            found = step(now.text)
            if isinstance(found, Refused):
                return Dropped(str(found), now.num_bytes)
            if found is not now.text:
                now = from_text(found)
            if isinstance(now, Dropped):
                return now
        return now

    return clean


def _steps(config: Clean) -> list[Step]:
    steps: list[Step] = []
    if config.normalise:
        steps.append(Normaliser(_needed("ftfy", "clean.normalise")))
    if config.language is not None:
        steps.append(_language(config.language))
    if config.rules:
        steps += _rules(config.rules)
    if config.mask_pii:
        steps.append(_mask())
    return steps


def _needed(module: str, setting: str, install: str = "'turnout[data]'") -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        raise DataError(
            f"{setting} needs {module.partition('.')[0]}, which is not installed: pip install {install}, "
            f"or leave the setting out."
        ) from None


def _rules(names: Sequence[Rules]) -> list[Step]:
    filters = _needed("datatrove.pipeline.filters", "clean.rules")
    document = _needed("datatrove.data", "clean.rules").Document
    from data_prep.words import Words

    words = Words()
    made = {
        "gopher_quality": filters.GopherQualityFilter,
        "gopher_repetition": filters.GopherRepetitionFilter,
        "c4_quality": filters.C4QualityFilter,
        "fineweb_quality": filters.FineWebQualityFilter,
    }
    return [_rule(name, made[name](language=words), document) for name in names]


def _rule(name: str, rule: Any, document: Any) -> Step:
    title = name.replace("_", " ")

    def step(text: str) -> str | Refused:
        page = document(text=text, id="")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing
                verdict = rule.filter(page)
        except ZeroDivisionError:  # datatrove's rules divide by the words of texts that have none
            return Refused(f"{title}: no words")
        is_kept, reason = verdict if isinstance(verdict, tuple) else (verdict, "")
        if is_kept:
            return str(page.text)  # C4 takes lines out
        reason = re.sub(r"[-_\d.]+", " ", str(reason)).strip() or "refused"
        return Refused(f"{title}: {reason}")

    return step


def _mask() -> Step:
    formatter = _needed("datatrove.pipeline.formatters", "clean.mask_pii").PIIFormatter()
    replacers = (formatter.emails_replacer, formatter.ip_replacer)

    def step(text: str) -> str:
        for replacer in replacers:
            replacer._replace_i = 0  # it goes on where the last document ended: then order would matter
        return str(formatter.format(text))

    return step


def _language(config: LanguageFilter) -> Step:
    if not Path(config.model).is_file():
        raise DataError(
            f"clean.language.model is {config.model}, which is not there: turnout downloads no models. Put a fastText "
            f"model such as lid.176.bin (fasttext.cc/docs/en/language-identification.html) there, or leave "
            f"clean.language out."
        )
    fasttext = _needed("fasttext", "clean.language", "fasttext-numpy2-wheel")
    try:
        model = fasttext.load_model(config.model)
    except Exception as error:  # fasttext raises ValueError for any file that is not a model
        raise DataError(
            f"{config.model}: fastText cannot load this model ({error}). Copy it again."
        ) from None
    wanted = {f"__label__{label}" for label in config.keep}

    def step(text: str) -> str | Refused:
        labels, scores = model.predict(text.replace("\n", " "), k=1)
        is_ours = bool(labels) and labels[0] in wanted and float(scores[0]) >= config.threshold
        return text if is_ours else Refused(LANGUAGE)

    return step
