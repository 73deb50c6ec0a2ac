"""VGG and its forward and backward pass, in the precision that was asked for."""
