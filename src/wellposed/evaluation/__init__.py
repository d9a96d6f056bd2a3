"""Scores and clocks: every score says what it was computed with, every ratio names its baseline."""
