"""Start, stop and watch training processes."""
