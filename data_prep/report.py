"""A data folder -> report.json and report.html: what is in it, where it is from, and what was dropped and why.

Equal folders give equal reports: neither times nor places are in them.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from data_prep.folder import shares
from data_prep.texts import QUARANTINE
from data_prep.verdicts import REASONS
from moe.data.shards import TokenData

JSON_NAME, HTML_NAME = "report.json", "report.html"
EXAMPLES = 3
"""Of each reason, so many documents are shown."""

LETTERS = 200
"""So much of the beginning of each."""

Examples = Mapping[str, Sequence[str]]
"""Beginnings of documents that were dropped, by reason."""


def write(folder: Path, examples: Examples | None = None) -> None:
    """Both, into a folder whose manifest is written; `examples` join those of the quarantine."""
    page = facts(TokenData.open(folder, verify=False), {**_quarantined(folder), **(examples or {})})
    told = json.dumps(page, indent=2, ensure_ascii=False) + "\n"
    (folder / JSON_NAME).write_bytes(told.encode(errors="replace"))
    (folder / HTML_NAME).write_bytes(_html(page).encode(errors="replace"))


def facts(data: TokenData, examples: Examples) -> dict[str, Any]:
    """What report.json says."""
    figures = shares(data)
    sources = data.manifest.sources
    kept = sum(source.kept.bytes for source in sources)
    documents, size = Counter[str](), Counter[str]()
    for source in sources:
        for reason, amount in source.dropped.items():
            documents[reason] += amount.documents
            size[reason] += amount.bytes
    tokens = sum(split["tokens"] for split in figures["splits"].values())
    return {
        "name": data.manifest.recipe.get("name", ""),
        "documents": sum(split["documents"] for split in figures["splits"].values()),
        "tokens": tokens,
        "bytes": kept,
        "bytes per token": round(kept / tokens, 3),
        "vocabulary": data.vocab_size,
        "splits": figures["splits"],
        "sources": [
            {
                "source": source.source,
                "read": source.read.model_dump(),
                "kept": source.kept.model_dump(),
                "tokens": source.tokens,
                "share of the bytes kept": round(source.kept.bytes / kept, 6) if kept else 0.0,
                "dropped": {reason: amount.model_dump() for reason, amount in source.dropped.items()},
            }
            for source in sources
        ],
        "dropped": [
            {
                "reason": reason,
                "documents": count,
                "bytes": size[reason],
                "examples": list(examples.get(reason, ())),
            }
            for reason, count in sorted(documents.items(), key=lambda item: (-item[1], item[0]))
        ],
        "duplicates": {reason: documents[reason] for reason in REASONS[1:] if reason in documents},
    }


def merged(all_examples: Iterable[Examples]) -> Examples:
    """The first ones of each reason."""
    found: dict[str, list[str]] = {}
    for examples in all_examples:
        for reason, texts in examples.items():
            here = found.setdefault(reason, [])
            here += texts[: EXAMPLES - len(here)]
    return found


def _quarantined(folder: Path) -> Examples:
    path = folder / QUARANTINE
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8") as file:
        rows = (json.loads(line) for line in file)
        return merged({row["reason"]: [row["begins"][:LETTERS]]} for row in rows if row["begins"])


def _html(page: Mapping[str, Any]) -> str:
    total = [
        ("documents", f"{page['documents']:,}"),
        ("tokens", f"{page['tokens']:,}"),
        ("bytes of text", f"{page['bytes']:,}"),
        ("bytes a token", f"{page['bytes per token']}"),
        ("vocabulary", f"{page['vocabulary']:,}"),
    ]
    read = sum(source["read"]["documents"] for source in page["sources"])
    parts = [
        f'<p class="total">{"".join(f"<span><b>{value}</b> {name}</span>" for name, value in total)}</p>',
        "<h2>Mixture</h2>",
        _bars(
            (source["source"], source["share of the bytes kept"], _percent(source["share of the bytes kept"]))
            for source in page["sources"]
        ),
        _table(
            ("source", "documents read", "kept", "dropped", "bytes kept", "tokens"),
            [
                (
                    source["source"],
                    source["read"]["documents"],
                    source["kept"]["documents"],
                    source["read"]["documents"] - source["kept"]["documents"],
                    source["kept"]["bytes"],
                    "unknown" if source["tokens"] is None else source["tokens"],
                )
                for source in page["sources"]
            ],
        ),
    ]
    for name, split in page["splits"].items():
        lengths = split["tokens of a document"]
        counts = split["documents shorter than"]
        parts += [
            f"<h2>Lengths: {escape(name)}</h2>",
            f"<p>{split['documents']:,} documents, {split['tokens']:,} tokens, {split['bytes per token']} bytes a "
            f"token; median {lengths['median']:,}, mean {lengths['mean']:,}, longest "
            f"{lengths['longest']:,} tokens.</p>",
            _bars(
                (f"below {int(edge):,}", count / max(counts.values()), f"{count:,}")
                for edge, count in counts.items()
            ),
        ]
    parts.append("<h2>Dropped</h2>")
    if not page["dropped"]:
        parts.append("<p>Nothing was.</p>")
    for drop in page["dropped"]:
        share = _percent(drop["documents"] / read)
        count = f"{drop['documents']:,} documents, {share} of those read; {drop['bytes']:,} bytes"
        shown = "".join(f"<pre>{escape(text)}</pre>" for text in drop["examples"])
        parts.append(
            f"<details><summary><b>{escape(drop['reason'])}</b> {count}</summary>{shown or 'No example.'}</details>"
        )
    return _PAGE.substitute(name=escape(page["name"]), body="\n".join(parts))


def _bars(rows: Iterable[tuple[str, float, str]]) -> str:
    """(name, length from 0 to 1, figure) each."""
    lines = (
        f'<tr><td>{escape(name)}</td><td class="bar"><i style="width:{100 * length:.2f}%"></i></td>'
        f'<td class="n">{escape(figure)}</td></tr>'
        for name, length, figure in rows
    )
    return f"<table>{''.join(lines)}</table>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str | int]]) -> str:
    first = "".join(f"<th>{escape(head)}</th>" for head in heads)
    lines = (
        "".join(
            f'<td class="n">{cell:,}</td>' if isinstance(cell, int) else f"<td>{escape(cell)}</td>"
            for cell in row
        )
        for row in rows
    )
    return f"<table><tr>{first}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


_PAGE = Template(
    """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>$name</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #24292f }
h2 { margin-top: 2rem; font-size: 1.1rem }
table { border-collapse: collapse; width: 100% }
td, th { padding: .2rem .6rem .2rem 0; text-align: left; overflow-wrap: anywhere }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.bar { width: 50% }
.bar i { display: block; height: .9rem; background: #d1661a; min-width: 1px }
.total span { margin-right: 2rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f5f7; padding: .5rem; margin: .4rem 0 }
</style>
<h1>$name</h1>
$body
</html>
"""
)
