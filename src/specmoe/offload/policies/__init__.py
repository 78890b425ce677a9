"""Eviction: which expert leaves a full cache. One file a policy, all with the same verbs (see ``state``)."""
