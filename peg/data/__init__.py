"""From sources to tables: reading, cleaning, deduplication, splitting, storage."""
