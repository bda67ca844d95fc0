"""What a training step is made of: attack, update, arithmetic, graph, several processes."""
