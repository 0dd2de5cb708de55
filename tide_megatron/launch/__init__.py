"""Starting ranks: on this node by ourselves, or as the ranks that torchrun or SLURM made us."""
