"""The outer loop of Lookahead around a torch optimizer. Imports torch alone."""
