"""One script a claim; each runs ours and the peer in turn in one call and writes what it found to results/."""
