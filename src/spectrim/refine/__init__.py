"""What is trained or re-solved after the cut."""
