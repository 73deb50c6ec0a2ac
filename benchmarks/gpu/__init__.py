"""What is measured on a GPU, in three calls; see `check`."""
