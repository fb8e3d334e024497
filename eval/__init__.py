"""Measures the shipped artifact from outside: a real server, a real harness, paired statistics."""
