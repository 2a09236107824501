"""The tables of the papers: planned, sampled, evaluated, compared with what was published, and reported."""
