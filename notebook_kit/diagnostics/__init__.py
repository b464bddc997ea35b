"""Diagnostics: numbers about weights, routing, adapters and alignments; arrays and DataFrames, no pictures."""
