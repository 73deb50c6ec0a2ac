"""Measurements. Ratios from one interleaved run, medians, with the machine and the command beside them."""
