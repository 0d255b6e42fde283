"""Long runs of the product's own processes, each a command that prints figures and exits with 1 if a promise broke."""
