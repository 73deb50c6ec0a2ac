"""How a picture is made: objective, optimisers, scales, batches, checkpoints."""
