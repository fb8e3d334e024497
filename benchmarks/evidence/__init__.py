"""The study behind docs/evidence.md: which arms, in which settings, measured how, told how."""
