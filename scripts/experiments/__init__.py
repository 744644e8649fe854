"""What the experiments share: training of a small model, the runs of all variants, and what came out."""
