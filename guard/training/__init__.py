"""Training with gradient regularizers; needs torch (`pip install guard[train]`)."""
