"""The conductor: the only package that knows the others."""
