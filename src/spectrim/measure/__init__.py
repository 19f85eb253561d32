"""What compressed models cost and how fast they are: one, two, a curve, a comparison."""
