"""What prefetching buys when experts do not all fit: caches, links, hardware, a simulator and its verdict."""
