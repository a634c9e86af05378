"""The questions of papers that criticize attribution maps, as measurements."""
