"""What we keep: rows and objects. Knows no web framework and no provider."""
