"""How good a mask is: scores per row, and their means."""
