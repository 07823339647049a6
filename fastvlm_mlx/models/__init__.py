"""Models by name: what `fastvlm generate MODEL` takes in place of a bundle's directory.

A bundle of the hub and the archives that Apple published are downloaded into the user's cache; what
is exported from a checkpoint is kept there, too. How a checkpoint becomes a bundle is the
exporter's, who gives its function to `resolve`.
"""
