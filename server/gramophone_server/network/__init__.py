"""VGG and its forward and backward pass in the chosen precision."""
