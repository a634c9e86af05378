"""The linear model of section 2 of the paper."""
