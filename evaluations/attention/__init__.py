"""What self-attention attends to: the analysis of the SAG paper (2210.00939, section 3)."""
