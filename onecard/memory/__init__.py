"""The memory that a run needs, term by term, and the memory that it used."""
