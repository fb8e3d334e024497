"""Speed as ratios in one run, and studies over arms and seeds."""
