"""udm: uniform diffusion with the leave-one-out posterior (arXiv 2605.22765)."""
