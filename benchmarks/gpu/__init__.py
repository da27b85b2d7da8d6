"""What only a GPU can show, by one command that also rehearses where there is none."""
