"""Should experts be prefetched here, and if not, what should change first?"""
