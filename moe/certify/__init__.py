"""A recipe -> proof that it trains the same in any layout as in one process."""
