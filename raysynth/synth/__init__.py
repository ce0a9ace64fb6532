"""Synthetic sets: what is rendered, how a shard is rendered and committed, and who renders it. No ray."""
