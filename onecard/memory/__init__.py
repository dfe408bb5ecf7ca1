"""Memory: what a run will need, term by term, and what it used."""
