"""Text -> token shards: sources -> documents -> tokenizer -> encode -> shards -> manifest."""
