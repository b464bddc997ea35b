"""Figures: arrays and DataFrames in, plotly figures out."""
