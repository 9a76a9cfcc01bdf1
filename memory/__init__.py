"""Where bytes live: the planner, the needs it plans by, arenas, extents, a machine's limits."""
