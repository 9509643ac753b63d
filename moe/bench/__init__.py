"""Side-by-side measurements, each a module to run: `python -m moe.bench.layer`."""
