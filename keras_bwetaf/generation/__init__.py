from keras_bwetaf.generation.sampling import BwETAFSampler

__all__ = ["BwETAFSampler"]
