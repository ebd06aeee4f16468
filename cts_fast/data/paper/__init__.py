"""The data sets of the paper's experiments in their official layouts, as the suites "paper" and "imagenet"."""
