"""The field's attacks on a trained network, AutoAttack among them, and the figures they lead to."""
