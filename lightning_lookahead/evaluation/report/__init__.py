"""A page about one run: its files are read in `run`, drawn in `charts`, and put together in `page`."""
