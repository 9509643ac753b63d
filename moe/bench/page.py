"""A report -> the page that --json writes."""

import json
from dataclasses import asdict
from typing import Any

from moe.bench.case import Case
from moe.bench.compare import Report


def as_page(case: Case, report: Report, *, machine: dict[str, Any]) -> dict[str, Any]:
    """All of it, as plain data."""
    return {"machine": machine, "case": {**asdict(case), "device": case.device.type}, **asdict(report)}


def dump(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1) + "\n"
