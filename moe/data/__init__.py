"""Token shards on disk -> batches: `shards` reads and writes them, `rows` cuts or packs, `loader` deals them out."""
