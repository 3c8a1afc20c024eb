"""Pictures of a network: accuracy against epsilon, and the loss around an image."""
