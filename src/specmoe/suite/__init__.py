"""Many runs: predictors × seeds, resumable, then one results file."""
