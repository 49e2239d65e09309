"""What does: agents on nodes and bundles in processes, on Ray or in this process."""
