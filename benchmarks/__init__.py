"""Measure deisa-ray beside its peers, on the same work in the same run: ``make bench``.

- ``suite``: what a case is, and what it finds out.
- ``cases/``: one module for each question, each with one or a few cases.
- ``programs/``: what runs in processes of its own: the ranks, and the peers' analytics.
- ``peers``: the peers' virtual environments.
- ``clusters``: Ray clusters that last as long as a case.
- ``intervals``: how well a median is known.
- ``results``: tables, JSON and plots.
"""
