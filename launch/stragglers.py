"""What agents report of their ranks -> the ranks, by host, that the others wait for. Pure."""

import statistics
from collections.abc import Iterator, Sequence

from launch.folder import NodeReport, RankReport

_SLOW = 1.5
"""Times what the others work in a step. Rank 0 does a little more than the others, and may."""

_MATTERS = 0.2
"""Of a step: what a rank works more than the others must take so much of it to be worth a word."""


def slow(reports: Sequence[NodeReport]) -> list[tuple[NodeReport, RankReport]]:
    """Ranks that work much longer in a step than their peers do, and wait less."""
    known = [(report, rank) for report in reports for rank in report.ranks if rank.works > 0]
    found = []
    for report, rank in known:
        others = [other for _, other in known if other.rank != rank.rank]
        if not others:
            continue
        usual = statistics.median_low(other.works for other in others)
        least = max(_SLOW * usual, usual + _MATTERS * (rank.works + rank.waits))
        if rank.works > least and rank.waits < statistics.median_high(other.waits for other in others):
            found.append((report, rank))
    return found


def sentences(reports: Sequence[NodeReport]) -> Iterator[str]:
    """One a host."""
    late = slow(reports)
    names = [rank.rank for _, rank in late]
    usual = [
        rank.works for report in reports for rank in report.ranks if rank.rank not in names and rank.works > 0
    ]
    for report in dict.fromkeys(report for report, _ in late):
        ranks = [rank for _, rank in late if rank in report.ranks]
        every = "every rank" if len(ranks) == len(report.ranks) > 1 else _listed(ranks)
        works = max(rank.works for rank in ranks)
        yield (
            f"{report.host} is slow: {every} there works {works:.3f} s in a step, others "
            f"{statistics.median(usual):.3f} s and wait"
        )


def _listed(ranks: Sequence[RankReport]) -> str:
    return " and ".join(f"rank {rank.rank}" for rank in ranks)
