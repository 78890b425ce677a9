"""Measuring the machine that one sits at, into a profile."""
