"""Models that are no language models, or no dense ones, each in one file."""
