"""Tests of ``msam_analysis`` against oracles that share no code with it."""
