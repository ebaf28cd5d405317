"""What makes a trained model cheaper to sample from without training it again: caching, shared encoder states."""
