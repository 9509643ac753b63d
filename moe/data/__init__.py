"""Token shards on disk -> batches: `shards` reads and writes them, `loader` makes batches of them."""
