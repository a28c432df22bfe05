"""Tasks with verifiable rewards: data sets with topics and levels, and reward functions that never evaluate model text.

Needs ``pip install "ebpo-core[train]"`` as soon as a data set or a model is built; importing this package does not.
"""
