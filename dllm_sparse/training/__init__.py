"""Training of the small twins: one recipe, two objectives, the same transformer, data order and token budget."""
