"""The compiler under fxrank: torch.fx graphs and weight matrices in and out. Knows nothing of training."""
