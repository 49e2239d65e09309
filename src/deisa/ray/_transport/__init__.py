"""The agent's side of the hand-off, and its readers': addresses, messages, memory, pages, connections."""
