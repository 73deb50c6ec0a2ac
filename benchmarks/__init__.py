"""Measurements: medians and ratios from interleaved runs, each with the machine and the command it was made with."""
