"""Distributed fitting and explaining with PatternNet and PatternAttribution, as jobs on Ray."""
