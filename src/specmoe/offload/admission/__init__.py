"""What is worth prefetching: one file a rule."""
