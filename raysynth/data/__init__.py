"""Real images and plans: sources, decoding, labels, splits, subsets, plans, training views. No torch, no ray."""
