"""What a prefetcher foresees at each event, worked out for a whole trace before any simulation."""
