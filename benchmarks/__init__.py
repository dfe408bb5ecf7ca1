"""One script per claim. Each one runs onecard and the peer in turn in one call, and writes its results to results/."""
