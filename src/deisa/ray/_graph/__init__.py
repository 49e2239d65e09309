"""From Dask graphs to bundles: leaves, assembling, placement, and running a bundle; no Ray here."""
