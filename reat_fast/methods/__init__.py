"""In what methods differ: objective, attack, radii, classifier head, perturbed weights."""
