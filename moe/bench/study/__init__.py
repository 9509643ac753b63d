"""Whole trainings side by side: `python -m moe.bench.study PLAN`."""
