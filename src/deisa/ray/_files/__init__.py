"""Saving timesteps to files: what is saved, where it goes, and how a file changes; no Ray, no session."""
