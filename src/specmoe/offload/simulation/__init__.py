"""Event by event through a cache with walls and a link that takes time."""
