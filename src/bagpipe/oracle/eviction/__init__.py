"""The eviction policy of a cache: Belady's MIN over the lookahead window."""
