"""A whole training run in one folder: `train`, `keras-bwetaf train`."""
