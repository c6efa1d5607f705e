"""State, optimiser and step: what one update of a dictionary is."""
