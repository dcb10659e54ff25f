"""Shard servers: the place where records live when there is more than one trainer."""
