"""Who holds what: spec and headers -> slices -> plans of shards -> workers. Pure, and without torch."""
