"""Everything a person sees of the results, made from a results file alone: ``terminal``, ``html``, ``charts``."""
