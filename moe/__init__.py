"""Train sparse mixture-of-experts Transformers: model, engine, checkpoints, Hugging Face at both ends."""
