"""Formats whose codes stand for several weights at once: points of a lattice, paths through a trellis.

grid.py is the format: a code of tiles times a scale of each row. lattice.py and e8p.py are QuIP#'s codes of eight
weights, trellis.py and trellis_codes.py QTIP's of sixteen by sixteen, viterbi.py its search.
additive.py is a format of its own, AQLM's sums of entries that are learned; vector_kmeans.py learns them.
"""
